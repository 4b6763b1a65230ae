"""Evaluation through the same parallel path as training: held-out loss, samples, logits."""
