"""Checkpoints in the global (unsharded) space, and the folder around them."""
