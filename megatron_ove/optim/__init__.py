"""Optimizers and the schedule; they see named parameters and tensors only."""
