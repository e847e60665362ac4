"""Optimizers (encoder; class centers) and the learning-rate schedule they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_ove.config.base import StrictModel


class ScheduleConfig(StrictModel):
    """Linear warm-up, then decay to `min_lr_ratio` of the base rate at the last step."""

    kind: Literal["cosine", "linear", "polynomial", "constant"] = "cosine"
    """Shape of the decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up; step s (from 0) runs at (s + 1) / (warmup_steps + 1) of the base rate."""
    decay_steps: Annotated[int, Field(gt=0)] | None = None
    """Step at which the decay ends; null = train.num_steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final rate as a share of the base rate."""
    power: Annotated[float, Field(gt=0)] = 2.0
    """Exponent of the polynomial decay (1 - progress) ** power."""


class ClassCenterOptimConfig(StrictModel):
    """AdamW of the class centers: what it touches and what it stores for each row."""

    update: Literal["row_sparse", "dense"] = "row_sparse"
    """row_sparse: only rows active in a step are read and written; dense: idle rows decay and drift too, every step."""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the centers; bfloat16 is rounded stochastically."""
    first_moment: Literal["float32", "bfloat16", "none"] = "none"
    """Storage of the running mean of gradients; none: each gradient is followed as it is, and beta1 has no effect."""
    second_moment: Literal["element", "row"] = "row"
    """One running mean of squares per element, or one per row (mean over its elements)."""
    lr_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """Class-center rate / encoder rate."""
    lr_scaling: Literal["active_share", "none"] = "active_share"
    """active_share: with row_sparse, the rate is divided by the share of rows that a step touches, at most times 4."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay of the rows that are updated."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad_norm: Annotated[float, Field(ge=0)] = 5.0
    """Largest L2 norm of a table's gradient, taken over all its ranks; 0 = no clipping."""


class PartConfig(StrictModel):
    """What a part of the model does differently."""

    lr_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """Its learning rate / optim.lr."""
    weight_decay_multiplier: Annotated[float, Field(ge=0)] = 1.0
    """Its weight decay / optim.weight_decay; norms, biases and the pooling probe have none all the same."""


class OptimConfig(StrictModel):
    """AdamW of dense weights: encoder and modules of objectives; no decay on norms, biases and the pooling probe."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Base learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay of weight matrices."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad_norm: Annotated[float, Field(ge=0)] = 5.0
    """Largest L2 norm of the dense weights' gradient over all ranks; 0 = no clipping."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Rate of an encoder layer / rate of the layer behind it; 1 = all move at the same rate."""
    parts: dict[str, PartConfig] = {}
    """Part of the model -> what it does differently. A part is the beginning of weights' names up to a dot, like
    encoder.head, encoder.layers.0-5 or objectives.<name>; of several that fit, the longest counts."""
    schedule: ScheduleConfig = ScheduleConfig()
    class_centers: ClassCenterOptimConfig = ClassCenterOptimConfig()

    def _check_warmup_before_decay(self) -> Iterator[str]:
        schedule = self.schedule
        if schedule.decay_steps is not None and schedule.warmup_steps >= schedule.decay_steps:
            yield (
                f"schedule.warmup_steps = {schedule.warmup_steps} is not below schedule.decay_steps = "
                f"{schedule.decay_steps}, so the rate would never decay; shorten the warm-up or decay later"
            )
