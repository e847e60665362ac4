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
    sequence_parallel: bool = False
    """Whether norms and residuals are split over the tensor-parallel ranks along the sequence."""
    use_distributed_optimizer: bool = False
    """Whether optimizer state is sharded over the data-parallel ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto = CUDA with NCCL when a device is there, else CPU with gloo."""
    timeout_s: Annotated[int, Field(gt=0)] = 1800
    """Seconds a collective may wait for a missing rank before the run fails."""

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
