"""Text to Megatron ``.bin/.idx`` files, and from these to micro-batches."""
