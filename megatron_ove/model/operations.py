"""Operations that the encoder asks for: what TFLOP/s and MFU are measured by.

A multiplication and an addition count as two. A backward pass costs twice its forward pass; patches need no gradient.
"""

from __future__ import annotations

from megatron_ove.config.encoder import EncoderConfig


def encoder_operations(encoder: EncoderConfig, *, tokens: float, samples: float, squares: float) -> dict[str, float]:
    """Returns the operations of forward and backward, by part.

    Only real tokens count, nothing is counted twice for recomputation or tensor parallelism.

    Args:
        encoder: the encoder.
        tokens: patches without padding.
        samples: that they belong to.
        squares: of the samples' patch counts, summed.
    """
    hidden, ffn = encoder.hidden_size, encoder.ffn_hidden_size
    head = tokens * (4 * hidden * hidden + 4 * hidden) + samples * 2 * (hidden * hidden + 2 * hidden * ffn)
    return {
        "patch embedding": 2 * 2 * tokens * 3 * encoder.patch_size**2 * hidden,
        "linear layers": 3 * 2 * tokens * encoder.num_layers * (4 * hidden * hidden + 2 * hidden * ffn),
        "attention": 3 * 4 * squares * hidden * encoder.num_layers,
        "pooling head": 3 * head,
    }
