"""`Objective`: a head, its loss and the labels it needs. The training loop knows objectives only through this.

Objectives live on the last pipeline stage. They return local *sums*; the division by the number of samples of the step
happens once, in the training step, with a number counted before the first forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.outputs import LossTerms, VisionFeatures


class Objective(ABC):
    """One objective. `forward` and what follows it are collective over the ranks of the last pipeline stage.

    Order of a step: `find_mistake`, `message` and `prepare_step`, which another thread may call while the step before
    is still under way; `begin_step`; per microbatch `forward` and autograd's backward pass; `row_gradient_norm`; then
    `apply_update` or `discard_update`.

    Attributes:
        name: key in the configuration; prefix of metrics and checkpoint keys.
        source: data source whose samples it sees.
        message_width: int32 numbers that replicas tell one another of every sample of the source before a step.
    """

    name: str
    source: str
    message_width: int = 0

    @abstractmethod
    def num_items(self, batch: Batch) -> int:
        """Returns how many samples of this replica's microbatch the loss is summed over."""

    def find_mistake(self, batches: Sequence[Batch]) -> str:
        """Returns a sentence about what is wrong with this replica's microbatches of a step; "" = nothing."""
        return ""

    def message(self, batches: Sequence[Batch]) -> np.ndarray:
        """Returns what this replica tells the others, [samples of the source, message_width] int32, in batch order."""
        return np.zeros((sum(len(batch.rows_of(self.source)) for batch in batches), 0), dtype=np.int32)

    def prepare_step(self, step: int, batches: Sequence[Batch], sample_counts: np.ndarray, messages: np.ndarray) -> Any:
        """Returns what `begin_step` needs. Works on the host and changes nothing: the step before may be under way.

        Args:
            step: steps done before; random draws are functions of it.
            batches: this replica's microbatches.
            sample_counts: [replicas, microbatches of a replica] int64, samples of the source.
            messages: [n, message_width] int32, of all replicas, one after the other.

        Returns:
            Anything; tensors in it are on the CPU, pinned if the objective works on CUDA.
        """
        return None

    def begin_step(self, prepared: Any) -> None:  # noqa: B027 - nothing to do unless there is a table
        """Begins a step with what `prepare_step` returned; waits neither for the device nor for other ranks."""

    @abstractmethod
    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        """Returns the loss sum over this replica's samples of a microbatch, which may have none.

        `batch` is one of those given to `prepare_step`, or a copy of it on the device.

        The gradient that goes back to `features` is complete and identical on every tensor-parallel rank. The gradient
        that arrives at the loss sum must be the same number on every replica, as the training step's factors are.
        """

    @classmethod
    def forward_together(cls, objectives: Sequence[Self], features: VisionFeatures, batch: Batch) -> list[LossTerms]:
        """Returns what `forward` does, for all objectives of this class; a class may share collectives between them."""
        return [objective.forward(features, batch) for objective in objectives]

    def measure_held_out(
        self, pooled: Tensor, labels: Tensor, sample_counts: np.ndarray
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Says how well held-out samples are understood; changes nothing. Between steps, collective as `forward` is.

        Args:
            pooled: [n, h], pooled embeddings of this replica's samples; n may be 0.
            labels: [n, L] int32 on the CPU, their stored labels, -1 = none.
            sample_counts: [replicas] int64, samples of every replica.

        Returns:
            Figure -> (sum, count) over this replica's samples; the same names on every rank. None by default.
        """
        return {}

    @abstractmethod
    def row_gradient_norm(self) -> Tensor:
        """Returns the L2 norm of the gradient of the objective's own table; not finite if any part of it is not."""

    @abstractmethod
    def apply_update(self, lr: float) -> None:
        """Updates the objective's own table and ends the step.

        Args:
            lr: the schedule's learning rate for class centers.
        """

    @abstractmethod
    def discard_update(self) -> None:
        """Ends the step as if it had never begun."""

    @abstractmethod
    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as megatron-core sharded tensors whose keys start with `prefix`."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over tensors read for `sharded_state_dict`."""
