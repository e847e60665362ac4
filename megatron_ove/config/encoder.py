"""The vision encoder: sizes, rotary positions, layer implementation, recompute, FP8.

The defaults are the OneVision-Encoder's constants; the three published sizes are `examples/_base/encoder_*.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from megatron_ove.config.base import StrictModel
from megatron_ove.config.fp8 import FP8_RECIPES

if TYPE_CHECKING:
    from megatron_ove.config.train import TrainConfig


class EncoderSection(StrictModel):
    """What every kind of encoder has."""

    kind: str
    hidden_size: Annotated[int, Field(gt=0)]
    """Width of the features that objectives see."""
    num_layers: Annotated[int, Field(gt=0)]
    """Number of transformer layers, which pipeline stages share."""
    patch_size: Annotated[int, Field(gt=0)] = 14
    """Side of a square patch in pixels."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of weights at the start, also of objectives' modules."""

    @property
    def has_pooling(self) -> bool:
        """Whether features have an embedding of every segment."""
        return True

    @property
    def token_multiple(self) -> int:
        """What the patches that a rank works on must be a multiple of."""
        return 1

    @property
    def is_fp8(self) -> bool:
        """Whether matrix products are computed in FP8."""
        return False

    def check_run(self, run: TrainConfig) -> Iterator[str]:
        """Yields a sentence for everything in which the encoder does not fit the rest of a run."""
        return iter(())


class EncoderConfig(EncoderSection):
    """A ViT over bags of patches, pre-norm, 3-D rotary positions, attention pooling."""

    kind: Literal["onevision"] = "onevision"  # pyright: ignore[reportIncompatibleVariableOverride]
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
    """Whether the encoder has its attention-pooling head."""
    final_norm: bool | None = None
    """Whether tokens pass a norm behind the last layer; null = where there is a pooling head, as published."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: share of samples for which a branch of the last layer is left out in training; linearly less
    before it, and 0 at the first layer."""
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

    @property
    def has_final_norm(self) -> bool:
        return self.use_head if self.final_norm is None else self.final_norm

    @property
    def has_pooling(self) -> bool:
        return self.use_head

    def _check_head_has_norm(self) -> Iterator[str]:
        if self.use_head and self.final_norm is False:
            yield (
                "final_norm = false with use_head = true: the pooling head was made for normed tokens; leave "
                "final_norm out, or set use_head: false"
            )

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

    @property
    def token_multiple(self) -> int:
        return 1 if self.fp8 == "off" else FP8_RECIPES[self.fp8].multiple

    @property
    def is_fp8(self) -> bool:
        return self.fp8 != "off"

    def check_run(self, run: TrainConfig) -> Iterator[str]:
        yield from self._divides_over_ranks(run)
        yield from self._fits_fp8_tokens(run)
        yield from self._fits_fp8_precision(run)
        yield from self._fits_fp8_widths(run)
        yield from self._fits_fp8_layers(run)
        yield from self._fits_evaluation(run)

    def _divides_over_ranks(self, run: TrainConfig) -> Iterator[str]:
        size = run.parallel.tensor_model_parallel_size
        for field in ("hidden_size", "num_attention_heads", "ffn_hidden_size"):
            value = getattr(self, field)
            if value % size:
                yield (
                    f"encoder.{field} = {value} is not divisible by parallel.tensor_model_parallel_size = {size}, "
                    f"so ranks would get unequal shares; change one of the two"
                )

    def _fits_fp8_tokens(self, run: TrainConfig) -> Iterator[str]:
        parallel, budget, fp8 = run.parallel, run.data.tokens_per_microbatch, self.fp8
        if fp8 == "off":
            return
        share = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        multiple = FP8_RECIPES[fp8].multiple * share
        if budget % multiple:
            ranks = f" on each of {share} sequence-parallel ranks" if share > 1 else ""
            yield (
                f"data.tokens_per_microbatch = {budget} is not a multiple of {multiple}, which FP8 matrix products of "
                f"encoder.fp8 = {fp8} need{ranks}; use {-(-budget // multiple) * multiple}"
            )

    def _fits_fp8_precision(self, run: TrainConfig) -> Iterator[str]:
        if self.fp8 != "off" and run.train.precision != "bf16":
            yield (
                f"encoder.fp8 = {self.fp8} with train.precision = {run.train.precision}: FP8 layers take and "
                "give bf16; set train.precision: bf16, or encoder.fp8: off"
            )

    def _fits_fp8_widths(self, run: TrainConfig) -> Iterator[str]:
        size, fp8 = run.parallel.tensor_model_parallel_size, self.fp8
        if fp8 == "off":
            return
        multiple = FP8_RECIPES[fp8].multiple * size
        for field in ("hidden_size", "ffn_hidden_size"):
            value = getattr(self, field)
            if value % multiple:
                ranks = f" on each of {size} tensor-parallel ranks" if size > 1 else ""
                yield (
                    f"encoder.{field} = {value} is not a multiple of {multiple}, which FP8 matrix products of "
                    f"encoder.fp8 = {fp8} need{ranks}; use another fp8 recipe, a multiple of {multiple}, or fp8: off"
                )

    def _fits_fp8_layers(self, run: TrainConfig) -> Iterator[str]:
        stages = run.parallel.pipeline_model_parallel_size
        most = self.num_layers // stages
        for field in ("fp8_skip_first_layers", "fp8_skip_last_layers"):
            value = getattr(self, field)
            if self.fp8 != "off" and most < value < self.num_layers:
                yield (
                    f"encoder.{field} = {value} is more than the {most} layers of one of {stages} equal pipeline "
                    f"stages, which is megatron-core's limit; use at most {most}"
                )

    def _fits_evaluation(self, run: TrainConfig) -> Iterator[str]:
        if run.evaluation.sets and self.fp8 == "delayed":
            yield (
                "evaluation.sets with encoder.fp8 = delayed: the scaling history would take in the held-out samples, "
                "and measuring would change the run; use another fp8 recipe, or measure checkpoints with megatron-ove "
                "evaluate"
            )
