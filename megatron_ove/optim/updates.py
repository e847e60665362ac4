"""What a training step updates, behind one small interface: dense weights together, and every table of rows.

First all norms are computed, then all ranks agree whether everything is finite, and only then anything changes. So the
training step drives a list of updates and names no head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Update(Protocol):
    """A part of what is trained. A step calls `gradient_norms`, then `step` or `discard`; all are collective."""

    def gradient_norms(self) -> Mapping[str, float | Tensor]:
        """Returns name -> L2 norm before clipping, the same on every rank that shares the weights; "" = dense weights.
        Not finite if any part of the gradient is not. Changes nothing that lasts."""
        ...

    def describe(self, name: str) -> str:
        """Returns what the norm with this name is of, for messages."""
        ...

    def step(self, lr: float) -> None:
        """Clips and updates, after norms that were finite; `lr` is the schedule's rate of the step."""
        ...

    def discard(self) -> None:
        """Ends the step as if it had never begun."""
        ...


class RowTable(Protocol):
    """A table of which a step touches some rows, updated by an optimizer of its own; nobody's parameter."""

    @property
    def name(self) -> str:
        """What metrics and messages call it; unique in a run."""
        ...

    @property
    def lr_multiplier(self) -> float:
        """Its rate / the rate of dense weights."""
        ...

    def gradient_norm(self) -> Tensor:
        """Returns the L2 norm of the step's gradient over the whole table, before clipping, a scalar; collective over
        the ranks that share it."""
        ...

    def apply_update(self, lr: float) -> None:
        """Clips, updates rows at this rate and ends the step; collective."""
        ...

    def discard_update(self) -> None:
        """Ends the step as if it had never begun."""
        ...
