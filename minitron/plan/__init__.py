"""What a run will need, from its configuration alone: memory, tokens, steps, FLOPs. Imports no torch."""
