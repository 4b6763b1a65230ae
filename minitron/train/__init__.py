"""The training loop. It knows objectives, not distillation."""
