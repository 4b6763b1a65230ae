"""Distillation: a teacher's states as a signal, and the loss that reads them."""
