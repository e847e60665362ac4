"""A causal text decoder on megatron-core's layers, with image tokens in its input."""
