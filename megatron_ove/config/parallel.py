"""How one model is spread over ranks. Data parallel size is what remains: world size / (tensor x pipeline)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_ove.config.base import StrictModel


class ParallelConfig(StrictModel):
    """Tensor, sequence, pipeline and data parallelism."""

    tensor_model_parallel_size: Annotated[int, Field(gt=0)] = 1
    """Ranks that share every layer."""
    pipeline_model_parallel_size: Annotated[int, Field(gt=0)] = 1
    """Ranks that hold successive layers."""
    virtual_pipeline_model_parallel_size: Annotated[int, Field(gt=1)] | None = None
    """Model chunks per pipeline rank (interleaved schedule); null = the plain 1F1B schedule."""
    num_layers_in_first_stage: Annotated[int, Field(gt=0)] | None = None
    """Transformer layers of the first pipeline stage, in all its chunks; null = as many as the middle stages."""
    num_layers_in_last_stage: Annotated[int, Field(gt=0)] | None = None
    """Transformer layers of the last pipeline stage, which also has the heads; null = as many as the middle stages."""
    context_parallel_size: Annotated[int, Field(gt=0)] = 1
    """Ranks that share one sample's tokens; only 1 is offered."""
    sequence_parallel: bool = False
    """Whether norms and residuals are split over the tensor-parallel ranks along the sequence."""
    use_distributed_optimizer: bool = False
    """Whether optimizer state is sharded over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Whether gradients are reduced over the data-parallel ranks while the last backward pass goes on."""
    overlap_param_gather: bool = False
    """Whether updated weights are gathered while the next forward pass goes on; needs the two above."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto = CUDA with NCCL when a device is there, else CPU with gloo."""
    timeout_s: Annotated[int, Field(gt=0)] = 1800
    """Seconds a collective may wait for a missing rank before the run fails: up to the first step, and in saves."""
    step_timeout_s: Annotated[int, Field(gt=0)] = 600
    """The same in every later step, so that a rank that hangs is found sooner; never more than `timeout_s`."""

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """Returns how many of the encoder's layers each pipeline stage holds.

        Args:
            num_layers: of the encoder; checked to fit (`TrainConfig`).
        """
        ends = (self.num_layers_in_first_stage, self.num_layers_in_last_stage)
        given = [size for size in ends if size is not None]
        others = self.pipeline_model_parallel_size - len(given)
        sizes = [(num_layers - sum(given)) // others] * others if others else []
        return [*given[: ends[0] is not None], *sizes, *given[ends[0] is not None :]]

    def _check_sequence_parallel(self) -> Iterator[str]:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            yield (
                "sequence_parallel = true with tensor_model_parallel_size = 1 has nothing to split the sequence over; "
                "set sequence_parallel: false or use at least 2 tensor-parallel ranks"
            )

    def _check_virtual_pipeline(self) -> Iterator[str]:
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            yield (
                f"virtual_pipeline_model_parallel_size = {self.virtual_pipeline_model_parallel_size} needs "
                "pipeline_model_parallel_size >= 2, because chunks are interleaved over pipeline ranks; set it to null"
            )

    def _check_uneven_stages(self) -> Iterator[str]:
        for name in ("num_layers_in_first_stage", "num_layers_in_last_stage"):
            size, chunks = getattr(self, name), self.virtual_pipeline_model_parallel_size or 1
            if size is None:
                continue
            if self.pipeline_model_parallel_size == 1:
                yield (
                    f"{name} = {size} with pipeline_model_parallel_size = 1 has only one stage, which holds all "
                    "layers; set it to null or use at least 2 stages"
                )
            elif size % chunks:
                yield (
                    f"{name} = {size} is not divisible by virtual_pipeline_model_parallel_size = {chunks}, so the "
                    f"chunks of this stage would get unequal numbers of layers; use a multiple of {chunks}"
                )

    def _check_context_parallel(self) -> Iterator[str]:
        if self.context_parallel_size != 1:
            yield (
                f"context_parallel_size = {self.context_parallel_size} is not offered: a sample's few thousand tokens "
                "stay whole on a rank, and attention and pooling run inside one sample, so there is nothing to gain; "
                "set it to 1, and where memory is short use tensor_model_parallel_size with sequence_parallel, or a "
                "smaller data.tokens_per_microbatch"
            )

    def _check_overlap_param_gather(self) -> Iterator[str]:
        missing = [n for n in ("use_distributed_optimizer", "overlap_grad_reduce") if not getattr(self, n)]
        if self.overlap_param_gather and missing:
            yield (
                f"overlap_param_gather = true with {' and '.join(f'{name} = false' for name in missing)} has no "
                "gathering of weights, bucket by bucket, that it could overlap; set them to true, or "
                "overlap_param_gather to false"
            )
