"""Figures on held-out data while a run trains."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_ove.config.base import StrictModel


class EvaluationConfig(StrictModel):
    """How well samples that the run does not train on find their labels among the class centers."""

    sets: dict[str, str] = {}
    """Objective name -> folder of a shard set that it is measured on; of the kind of its source, with the same classes.
    Without any nothing is measured."""
    interval_steps: Annotated[int, Field(gt=0)] = 1000
    """Steps between measurements; the last step of the run is always measured."""
    max_samples: Annotated[int, Field(gt=0)] = 1000
    """Most samples of a set that are looked at, spread evenly over it; always the same ones."""
