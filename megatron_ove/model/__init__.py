"""The vision encoder on megatron-core: packed patches in, token features and one pooled embedding per sample out."""
