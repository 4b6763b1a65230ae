"""Pruning: scores from activations, a spec of what to keep, and the slicer that applies it."""
