"""The seams with foreign code: the CPU device layer for Megatron-Core."""
