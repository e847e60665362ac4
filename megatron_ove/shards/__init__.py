"""Shard sets: how samples are stored, written, joined, opened and checked. Knows nothing of training."""
