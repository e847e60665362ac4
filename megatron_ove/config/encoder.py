"""The vision encoder: sizes, rotary positions, layer implementation, recompute, FP8.

The defaults are the OneVision-Encoder's constants; the three published sizes are `examples/_base/encoder_*.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_ove.config.base import StrictModel


class EncoderConfig(StrictModel):
    """A ViT over bags of patches, pre-norm, 3-D rotary positions, attention pooling."""

    hidden_size: Annotated[int, Field(gt=0)]
    """Width of the token stream."""
    num_layers: Annotated[int, Field(gt=0)]
    """Number of transformer layers."""
    num_attention_heads: Annotated[int, Field(gt=0)]
    """Attention heads; the head dim hidden_size / num_attention_heads must be divisible by 32."""
    ffn_hidden_size: Annotated[int, Field(gt=0)]
    """Width of the MLP between fc1 and fc2."""
    patch_size: Annotated[int, Field(gt=0)] = 14
    """Side of a square patch in pixels."""
    layer_norm_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of every norm, the pooling head's RMSNorm included."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of linear and patch-embedding weights at the start."""
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary frequencies."""
    rope_temporal_size: Annotated[int, Field(gt=0)] = 64
    """Frames of the virtual temporal grid that video positions live on."""
    use_head: bool = True
    """Whether the encoder has its final norm and attention-pooling head."""
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto = Transformer Engine when it is installed and a GPU is there, else local."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass to save memory."""
    fp8: Literal["off", "delayed", "current"] = "off"
    """FP8 recipe of the Transformer Engine linear layers; off elsewhere."""
    mcore_overrides: dict[str, Any] = {}
    """Fields of megatron-core's TransformerConfig set to these values; the checked escape hatch."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def _check_heads_divide_hidden(self) -> Iterator[str]:
        if self.hidden_size % self.num_attention_heads:
            yield (
                f"hidden_size = {self.hidden_size} is not divisible by num_attention_heads = "
                f"{self.num_attention_heads}, so heads would have unequal widths; change one of the two"
            )

    def _check_head_dim(self) -> Iterator[str]:
        if self.hidden_size % self.num_attention_heads == 0 and self.head_dim % 32:
            yield (
                f"head dim = hidden_size / num_attention_heads = {self.head_dim} is not divisible by 32, which the "
                f"4:6:6 split of the rotary dims over time, height and width needs; use heads of 32, 64, 96 or 128"
            )
