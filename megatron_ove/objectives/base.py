"""`Objective`: a head, its loss and the labels it needs. The training loop knows objectives only through this.

Objectives live on the last pipeline stage. They return local *sums*; the division by the number of samples of the step
happens once, in the training step, with a number counted before the first forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.outputs import LossTerms, VisionFeatures


class Objective(ABC):
    """One objective. All methods but `num_items` are collective over the ranks of the last pipeline stage.

    Order of a step: `begin_step`; per microbatch `forward` and autograd's backward pass; `row_gradient_norm`; then
    `apply_update` or `discard_update`.

    Attributes:
        name: key in the configuration; prefix of metrics and checkpoint keys.
        source: data source whose samples it sees.
    """

    name: str
    source: str

    @abstractmethod
    def num_items(self, batch: Batch) -> int:
        """Returns how many samples of this replica's microbatch the loss is summed over."""

    @abstractmethod
    def begin_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Prepares a step.

        Args:
            step: steps done before; random draws are functions of it.
            batches: this replica's microbatches, equally many on every replica; `forward` gets these very objects.

        Raises:
            DataError: a label does not fit; on every rank of the stage.
        """

    @abstractmethod
    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        """Returns the loss sum over this replica's samples of a microbatch, which may have none.

        The gradient that goes back to `features` is complete and identical on every tensor-parallel rank. The gradient
        that arrives at the loss sum must be the same number on every replica, as the training step's factors are.
        """

    @classmethod
    def forward_together(cls, objectives: Sequence[Self], features: VisionFeatures, batch: Batch) -> list[LossTerms]:
        """Returns what `forward` does, for all objectives of this class; a class may share collectives between them."""
        return [objective.forward(features, batch) for objective in objectives]

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
