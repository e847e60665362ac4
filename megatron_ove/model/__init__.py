"""The OneVision-Encoder on megatron-core layers, over bags of patches."""
