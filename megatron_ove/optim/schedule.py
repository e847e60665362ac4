"""The learning rate as a pure function of the step.

Nothing here has state, so a resumed run has the right rate by construction. One function serves both optimizers: the
encoder's rate is `learning_rate(...)`, the class centers' is that times `optim.class_centers.lr_multiplier`.
"""

from __future__ import annotations

import math
from typing import assert_never

from megatron_ove.config.optim import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, *, base_lr: float, step: int, num_steps: int) -> float:
    """Returns the rate of optimizer step `step`, counted from 0.

    Warm-up: (step + 1) / (warmup_steps + 1) of the base rate, so that step 0 already moves and step `warmup_steps` is
    the first one at the full rate. Then decay to `min_lr_ratio` of the base rate, reached at step `decay_steps` (or
    `num_steps` where that is null) and kept from there on.

    Args:
        schedule: shape of the schedule.
        base_lr: rate at the end of the warm-up.
        step: optimizer steps done so far, >= 0.
        num_steps: length of the run.
    """
    warmup_steps = schedule.warmup_steps
    if step < warmup_steps:
        return base_lr * (step + 1) / (warmup_steps + 1)
    end = schedule.decay_steps or num_steps
    progress = min(1.0, (step - warmup_steps) / (end - warmup_steps)) if end > warmup_steps else 1.0
    floor = schedule.min_lr_ratio
    return base_lr * (floor + (1.0 - floor) * _remaining(schedule, progress))


def _remaining(schedule: ScheduleConfig, progress: float) -> float:
    """Returns the share of the decay that is left, 1 at progress 0 and (except constant) 0 at progress 1."""
    match schedule.kind:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return 1.0 - progress
        case "polynomial":
            return (1.0 - progress) ** schedule.power
        case "constant":
            return 1.0
        case _:
            assert_never(schedule.kind)
