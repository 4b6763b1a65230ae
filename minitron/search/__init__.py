"""Candidate shapes: which there are, what they cost, and which of them go on."""
