"""Metrics as (sum, count) tensors, read back once per log interval.

Nothing here waits for the device between two reports: sums stay tensors. At a report, each rank's sums go to rank 0,
which adds them in rank order in float64, so that a figure does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MetricSums = Mapping[str, tuple[Tensor, Tensor]]


class Total(NamedTuple):
    """A metric over all ranks that added to it.

    Attributes:
        sum: of all ranks.
        count: of all ranks.
        largest: the largest sum / count of one rank; -inf when no rank counted.
    """

    sum: float
    count: float
    largest: float


class MetricAccumulator:
    """Sums of named metrics over steps; a metric's value is sum / count over all ranks that added to it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Adds to a metric; call it only on ranks that hold a share of their own (replicas would count twice)."""
        total, count = torch.as_tensor(total).detach().double(), torch.as_tensor(count).detach().double()
        if name in self._sums:
            before = self._sums[name]
            total, count = total + before[0], count + before[1]
        self._sums[name] = (total, count)

    def merge(self, other: MetricAccumulator) -> None:
        """Adds all sums of another accumulator."""
        for name, (total, count) in other._sums.items():
            self.add(name, total, count)

    def items(self) -> MetricSums:
        return self._sums

    def reduce(self) -> dict[str, Total]:
        """Returns name -> total over all ranks on rank 0, {} elsewhere, and starts anew; collective."""
        local = {name: (total.item(), count.item()) for name, (total, count) in self._sums.items()}
        self._sums = {}
        parts: list[dict[str, tuple[float, float]]] | None = None
        if dist.get_rank() == 0:
            parts = [{} for _ in range(dist.get_world_size())]
        dist.gather_object(local, parts, dst=0)
        totals: dict[str, Total] = {}
        for part in parts or []:
            for name, (total, count) in part.items():
                before = totals.get(name, Total(0.0, 0.0, float("-inf")))
                largest = max(before.largest, total / count) if count else before.largest
                totals[name] = Total(before.sum + total, before.count + count, largest)
        return totals


def averages(totals: Mapping[str, Total]) -> dict[str, float]:
    """Returns name -> sum / count, leaving out metrics without a count."""
    return {name: total.sum / total.count for name, total in totals.items() if total.count}
