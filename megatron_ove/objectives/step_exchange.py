"""One message before each step, for all objectives: what replicas must know of one another's samples.

How many samples every replica has follows from the step's plan, so no sizes are asked for. The message of a replica is

    mistake flag | samples that count, of each objective | numbers of the first objective's samples | the second's ...

in int32, padded to the longest replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_ove.errors import DataError


@dataclass(frozen=True)
class Messages:
    """What all replicas said.

    Attributes:
        has_mistake: whether any replica found a mistake.
        item_counts: [objectives] int64, samples that count, over all replicas.
        numbers: of each objective, [n, width] int32, all samples of its source, one replica after the other.
    """

    has_mistake: bool
    item_counts: np.ndarray
    numbers: list[np.ndarray]


class MessageLayout:
    """Where everything stands in the messages of a step.

    Attributes:
        length: int32 numbers of a message.
    """

    def __init__(self, sample_counts: Sequence[np.ndarray], widths: Sequence[int]) -> None:
        """
        Args:
            sample_counts: of each objective, [replicas] int64, samples of its source.
            widths: of each objective, numbers that a sample sends.
        """
        self._counts, self._widths = np.stack(sample_counts), list(widths)
        self._header = 1 + len(self._widths)
        sizes = self._counts * np.array(self._widths)[:, None]
        self._stops = self._header + np.cumsum(sizes, axis=0)  # [objectives, replicas]
        self._starts = self._stops - sizes
        self.length = int(self._stops[-1].max())

    def pack(
        self, replica: int, *, has_mistake: bool, item_counts: Sequence[int], numbers: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Returns a replica's message, [length] int32."""
        message = np.zeros(self.length, dtype=np.int32)
        message[: self._header] = [has_mistake, *item_counts]
        message[self._header : self._stops[-1, replica]] = np.concatenate([part.ravel() for part in numbers])
        return message

    def unpack(self, gathered: np.ndarray) -> Messages:
        """Reads the messages of all replicas, [replicas, length] int32."""
        columns = np.arange(self.length)
        numbers = []
        for counts, width, starts, stops in zip(self._counts, self._widths, self._starts, self._stops, strict=True):
            is_part = (columns >= starts[:, None]) & (columns < stops[:, None])
            numbers.append(gathered[is_part].reshape(int(counts.sum()), width))
        header = gathered[:, : self._header].sum(axis=0, dtype=np.int64)
        return Messages(bool(header[0]), header[1:], numbers)


def exchange(message: np.ndarray, group: dist.ProcessGroup) -> np.ndarray:
    """Returns the messages of all ranks of a group for tensors on the CPU, [ranks, length] int32."""
    if group.size() == 1:
        return message[None]
    gathered = torch.empty(group.size() * len(message), dtype=torch.int32)
    dist.all_gather_into_tensor(gathered, torch.from_numpy(message), group=group)
    return gathered.numpy().reshape(group.size(), -1)


def raise_mistake(mistake: str, group: dist.ProcessGroup, *, on_every_rank: bool) -> None:
    """Raises the first replica's mistake on all replicas; to be called by all of them when there is one.

    Args:
        mistake: this replica's, "" = none.
        group: the replicas, for tensors on the CPU.
        on_every_rank: whether this stops every rank of the run.

    Raises:
        DataError: always.
    """
    mistakes = [mistake]
    if group.size() > 1:
        mistakes = [""] * group.size()
        dist.all_gather_object(mistakes, mistake, group=group)
    raise DataError(next(text for text in mistakes if text), on_every_rank=on_every_rank)
