"""Objectives: a tagged union, one class per kind of head + loss. The map's names become metric prefixes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_ove.config.base import StrictModel


class PartialFCConfig(StrictModel):
    """Cluster discrimination against class centers sharded over ranks: a margin softmax per drawn label."""

    kind: Literal["partial_fc"] = "partial_fc"
    source: str
    """Name of the data source whose samples and labels this objective sees."""
    num_classes: Annotated[int, Field(gt=1)]
    """Rows of the class-center table; label ids are 0 .. num_classes - 1."""
    loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of this objective in the total loss."""
    labels_per_step: Annotated[int, Field(gt=0)] = 8
    """Labels drawn per sample and step from its stored ones, without replacement."""
    margin_type: Literal["cosface", "arcface"] = "cosface"
    """cosface: cos - margin on the target; arcface: cos(angle + margin)."""
    margin: Annotated[float, Field(ge=0, lt=1.5)] = 0.3
    """Margin: a cosine for cosface, radians for arcface."""
    logit_scale: Annotated[float, Field(gt=0)] = 64.0
    """Factor between cosine and logit."""
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the classes that are active in a step, its labels included (per slot if negatives = per_label)."""
    negatives: Literal["per_label", "shared"] = "per_label"
    """per_label: every label slot draws its own negative classes; shared: one set serves all slots."""
    co_positives: Literal["negative", "masked"] = "negative"
    """Whether a sample's other labels of the step count as negatives of a label or are left out."""
    interclass_filter: Annotated[float, Field(gt=-1, le=1)] = 0.75
    """Negatives with a cosine above this are taken for unlabelled positives; 1.0 switches the filter off."""
    interclass_filter_mode: Literal["zero", "mask"] = "zero"
    """zero: a filtered negative gets logit 0, as published; mask: it leaves the softmax."""
    class_group: Literal["stage", "tensor"] = "stage"
    """Ranks that share the table: all of the last pipeline stage (tensor x data), or the tensor-parallel ones only."""
    chunk_size: Annotated[int, Field(gt=0)] = 8192
    """Active rows per block of logits; bounds the memory of the softmax."""

    def _check_arcface_margin(self) -> Iterator[str]:
        if self.margin_type == "cosface" and self.margin >= 1:
            yield (
                f"margin = {self.margin} is outside [0, 1) for cosface, where it is subtracted from a cosine; "
                "use about 0.3, or margin_type: arcface for a margin in radians"
            )


ObjectiveConfig = PartialFCConfig
"""Union of every objective's config, told apart by `kind`."""
