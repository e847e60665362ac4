"""Charges the objectives' forward and backward passes to the phase `head`.

The backward pass of a microbatch begins with the objectives' part and reaches the features when that is done. Two
identities in the graph, one around the loss and one around the features, say when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.outputs import StepOutput, VisionFeatures
from megatron_ove.training.step_timers import StepTimers


def timed_head(
    timers: StepTimers,
    objectives: ObjectiveSet,
    features: VisionFeatures,
    batch: Batch,
    scales: Mapping[str, float],
) -> StepOutput:
    """Returns what `objectives.forward` returns; the values and gradients are the same."""
    with timers.phase("head"):
        given = {"tokens": features.tokens, "pooled": features.pooled}
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        marked = _Identity.apply(lambda: timers.leave("head"), *given.values())
        output = objectives.forward(replace(features, **dict(zip(given, marked, strict=True))), batch, scales)
        (loss,) = _Identity.apply(lambda: timers.enter("head"), output.loss)
        return replace(output, loss=loss)


class _Identity(torch.autograd.Function):
    """Returns its tensors. Backward: calls `arrived`, passes the gradients on."""

    @staticmethod
    def forward(ctx: Any, arrived: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.arrived = arrived
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.arrived()
        return None, *gradients
