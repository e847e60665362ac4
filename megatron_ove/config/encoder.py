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
    attention_backend: Literal["auto", "sdpa", "flash", "transformer_engine"] = "auto"
    """Attention within samples: torch's scaled_dot_product_attention, flash-attn, or Transformer Engine's choice of
    kernel; auto = Transformer Engine's with its layers, else flash-attn where it is installed, else torch's."""
    fused_kernels: bool = True
    """Whether layers on a GPU use Transformer Engine's fused rotation, Apex's LayerNorm and weight gradients that are
    added to the gradient buffer by the matrix product, where they are installed. Never on a CPU."""
    compile: bool = False
    """Whether torch.compile fuses the rotation of queries and keys where no fused kernel does; needs a C++ compiler on
    a CPU, Triton on a GPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass to save memory: none, attention's, or whole layers'."""
    fp8: Literal["off", "delayed", "current", "mxfp8", "blockwise"] = "off"
    """FP8 recipe of the matrix products in Transformer Engine layers. Everything else stays in bf16: patch embedding,
    attention, norms, pooling head, class centers."""
    fp8_skip_first_layers: Annotated[int, Field(ge=0)] = 0
    """First layers of the encoder that compute in bf16 all the same; not with `delayed`."""
    fp8_skip_last_layers: Annotated[int, Field(ge=0)] = 0
    """Last layers of the encoder that compute in bf16 all the same; not with `delayed`."""
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

    def _check_layer_spec(self) -> Iterator[str]:
        if self.layer_spec != "local":
            return
        if self.fp8 != "off":
            yield (
                f"fp8 = {self.fp8} needs Transformer Engine layers, and layer_spec = local has none, so FP8 would be "
                "ignored in silence; set layer_spec: auto, or fp8: off"
            )
        if self.attention_backend == "transformer_engine":
            yield (
                "attention_backend = transformer_engine needs Transformer Engine layers, and layer_spec = local has "
                "none; set layer_spec: auto, or attention_backend: auto"
            )

    def _check_fp8_layers(self) -> Iterator[str]:
        first, last = self.fp8_skip_first_layers, self.fp8_skip_last_layers
        if self.fp8 == "off" or not first + last:
            return
        if self.fp8 == "delayed":
            yield (
                f"fp8_skip_first_layers = {first} and fp8_skip_last_layers = {last} cannot be had with fp8 = delayed, "
                "which keeps one history of scales for all layers together; set both to 0, or use fp8: current"
            )
        elif first + last >= self.num_layers:
            yield (
                f"fp8_skip_first_layers + fp8_skip_last_layers = {first} + {last} leaves none of the num_layers = "
                f"{self.num_layers} to FP8; skip fewer layers, or set fp8: off"
            )
