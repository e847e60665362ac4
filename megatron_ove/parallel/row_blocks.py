"""Where rows lie when ranks have unequal numbers of them: worked out for all ranks at once, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ove.parallel.host_tensors import host_tensor


def concatenate_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the numbers start .. start + length - 1 of every pair, one range after the other, int64.

    Args:
        starts: integers of any shape, taken in row-major order.
        lengths: of the same shape, >= 0.
    """
    starts, lengths = starts.ravel(), lengths.ravel()
    stops = np.cumsum(lengths)
    return np.repeat(starts - (stops - lengths), lengths) + np.arange(lengths.sum())


@dataclass(frozen=True)
class GatheredRows:
    """What a gather of uneven rows needs to know. Every rank sends as many rows as the longest one, since collectives
    want equal shapes; one index then drops the padding and puts the rows in order.

    Attributes:
        longest: rows that each rank sends.
        places: [n] int64 on the device, where each row of the result lies among the (ranks x longest) gathered ones;
            None = the result is what was gathered.
        own: [n_rank] int64 on the device, where this rank's rows lie in the result.
    """

    longest: int
    places: Tensor | None
    own: Tensor


def arrange_gathered_rows(counts: np.ndarray, rank: int, device: torch.device) -> GatheredRows:
    """Plans a gather whose result has one block after the other, and within a block one rank after the other.

    Args:
        counts: [blocks, ranks] int64, rows; a rank has those of one block after those of the other.
        rank: this one.
        device: of the indices.
    """
    totals = counts.sum(axis=0)
    longest = int(totals.max())
    before = np.cumsum(counts, axis=0) - counts  # rows of earlier blocks on the same rank
    places = concatenate_ranges(before + np.arange(counts.shape[1]) * longest, counts)
    starts = np.cumsum(counts).reshape(counts.shape) - counts
    own = concatenate_ranges(starts[:, rank], counts[:, rank])
    is_as_gathered = len(counts) == 1 and len(places) == longest * counts.shape[1]
    return GatheredRows(longest, None if is_as_gathered else _send(places, device), _send(own, device))


def _send(places: np.ndarray, device: torch.device) -> Tensor:
    return host_tensor(places, device).to(device, non_blocking=True)
