"""Between megatron-core checkpoints and HuggingFace folders."""
