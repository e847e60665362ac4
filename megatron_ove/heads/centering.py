"""Centering: takes away what all samples of a microbatch have in common, in the gradient or in the embeddings.

Embeddings of a fresh encoder are nearly collinear, so most of what a softmax over cosines sends back moves them all
alike. With few samples that common part stalls learning for thousands of steps. Both functions are linear in what
passes through them, so ranks that each hold a part of a gradient may apply them before the parts are added up.

Shape letters: b gathered samples of a microbatch, e embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_ove.errors import CheckpointError

_DECAY = 0.9
"""Of the running mean over steps; a run's first steps count equally. A longer memory lags behind the encoder."""
_SHORTEST = 1e-3
"""A centered embedding that is shorter than this share of what it was is not brought to length 1."""
_EPSILON = 1e-12


def mean_weights(is_labelled: Tensor) -> Tensor:
    """Returns [b] fp32, what each sample counts in the mean over the labelled ones: 1 / their number, or 0."""
    counts = is_labelled.float()
    return counts / counts.sum().clamp(min=1.0)


def center_gradient(x: Tensor, is_labelled: Tensor) -> Tensor:
    """Returns `x`. Backward: each labelled sample's gradient less the mean of the labelled ones'.

    Args:
        x: [b, e] fp32, embeddings before they are normalized.
        is_labelled: [b] bool; other samples have no gradient and no part in the mean.
    """
    return _CenterGradient.apply(x, is_labelled)


def centered_directions(x: Tensor, is_labelled: Tensor) -> Tensor:
    """Returns [b, e] fp32: labelled samples less their mean, others as they are, all of length 1.

    The gradient goes through the mean. A sample that hardly differs from the mean, as when all are the same picture,
    stays shorter than 1, so that its gradient does not explode; a microbatch with one labelled sample teaches nothing.

    Args:
        x: [b, e] fp32, embeddings before they are normalized.
        is_labelled: [b] bool.
    """
    shortest = _SHORTEST * torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True).clamp(min=_EPSILON)
    centered = subtract_mean(x, is_labelled)
    return centered / torch.linalg.vector_norm(centered, dim=1, keepdim=True).clamp(min=shortest)


def subtract_mean(x: Tensor, is_labelled: Tensor) -> Tensor:
    """Returns [b, e]: labelled rows less their mean, the others as they are."""
    return x - is_labelled[:, None] * (mean_weights(is_labelled) @ x)


class _CenterGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, is_labelled: Tensor) -> Tensor:
        ctx.save_for_backward(is_labelled)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (is_labelled,) = ctx.saved_tensors
        return subtract_mean(gradient, is_labelled), None


class EmbeddingMean:
    """Running mean of a head's embeddings: what evaluation takes away where training took away a microbatch's mean.

    Until `apply_update` nothing that lasts has changed. Replicated over the ranks of the last pipeline stage.

    Attributes:
        value: [e] fp32; zeros before the first step.
        steps: steps with labelled samples so far, scalar int64.
    """

    def __init__(self, embedding_size: int, device: torch.device, replica_group: dist.ProcessGroup | None) -> None:
        """`replica_group`: ranks that observe different samples; None = all observe the same."""
        self._replicas = replica_group
        self.value = torch.zeros(embedding_size, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.discard_update()

    def observe(self, x: Tensor, is_labelled: Tensor) -> None:
        """Adds the labelled samples among `x` [b, e] to the step."""
        x = x.detach()
        self._sum = self._sum + is_labelled.float() @ x
        self._count = self._count + is_labelled.sum()

    def apply_update(self) -> None:
        """Moves the mean towards that of the step's labelled samples, without any it stays; collective."""
        if self._replicas is not None and self._replicas.size() > 1:
            dist.all_reduce(self._sum, group=self._replicas)
            dist.all_reduce(self._count, group=self._replicas)
        has_samples = self._count > 0
        share = (1 / (self.steps + 1)).clamp(min=1 - _DECAY) * has_samples
        self.value.lerp_(self._sum / self._count.clamp(min=1), share)
        self.steps += has_samples
        self.discard_update()

    def discard_update(self) -> None:
        """Ends the step as if it had never begun."""
        self._sum = torch.zeros_like(self.value)
        self._count = torch.zeros_like(self.steps)

    def start_with(self, mean: Tensor) -> None:
        """Takes a mean [e] that another run found; the first steps of this one replace it."""
        self.value.copy_(mean)

    def sharded_state_dict(self, prefix: str, replica: int) -> dict[str, Any]:
        """Returns what a checkpoint keeps; `replica` numbers the ranks that hold the same, 0 writes."""
        return {
            key: ShardedTensor(
                prefix + key,
                data,
                data.dtype,
                tuple(data.shape),
                tuple(data.shape),
                (0,) * data.ndim,
                None,
                replica_id=replica,
            )
            for key, data in self._state().items()
        }

    def load_state(self, state: Mapping[str, Any], name: str) -> None:
        """Takes over what was read for the keys of `sharded_state_dict`.

        Raises:
            CheckpointError: it is missing.
        """
        for key, data in self._state().items():
            if key not in state:
                raise CheckpointError(
                    f"the checkpoint has no running mean of the embeddings of objective '{name}', because it was saved "
                    "without centering: embeddings; set centering as it was, or use another run_dir to start anew"
                )
            data.copy_(state[key])
        self.discard_update()

    def _state(self) -> dict[str, Tensor]:
        return {"embedding_mean": self.value, "embedding_mean_steps": self.steps[None]}
