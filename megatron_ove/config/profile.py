"""Which steps of a run are recorded by torch's profiler."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_ove.config.base import StrictModel


class ProfileConfig(StrictModel):
    """A window of steps, written to `profile/` in the run folder; `train --profile START:COUNT` sets it."""

    start_step: Annotated[int, Field(gt=0)] | None = None
    """First step of the window, counted from 1 as in metrics.jsonl; null = no profile."""
    num_steps: Annotated[int, Field(gt=0)] = 3
    """Steps of the window."""
    ranks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """Global ranks that are recorded."""
    memory: bool = True
    """Whether memory is recorded too: a snapshot of the allocator on CUDA, peaks by phase on a CPU."""
