"""How a step's samples are divided into microbatches: few, equally long and equally costly, the same on every rank.

First-fit decreasing says how many microbatches the token budget needs; rounded up to whole rows of replicas, all of
them are used. Samples are then dealt out longest first, each to the emptiest microbatch, so that all are almost equally
long and hold much the same mixture. Last, microbatches are put in order of their cost, so that those which replicas
compute at the same time take equally long.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Samples in microbatches.

    Attributes:
        microbatch_index: [n] int64, microbatch of each sample.
        num_microbatches: M.
        longest: patches of the fullest microbatch.
    """

    microbatch_index: np.ndarray
    num_microbatches: int
    longest: int


def pack_samples(sizes: np.ndarray, *, capacity: int, multiple: int) -> Packing:
    """Divides samples into microbatches; microbatch j is the (j // multiple)-th of its row.

    Args:
        sizes: [n] int64 patches of each sample, each 1 .. capacity; n may not be 0.
        capacity: most patches of a microbatch.
        multiple: microbatches are as many as first-fit decreasing needs, rounded up to a multiple of this. A microbatch
            is empty only where there are fewer samples than microbatches.
    """
    first_fit = pack_first_fit_decreasing(sizes, capacity)
    count = -(-(int(first_fit.max()) + 1) // multiple) * multiple
    chosen = deal_longest_first(sizes, count)
    if np.bincount(chosen, weights=sizes).max() > capacity:
        chosen = first_fit  # the last samples found no room: rare, and then the microbatches are nearly full anyway
    # The cost of equally long microbatches differs by attention, which grows with the square of a sample's length.
    squares = np.bincount(chosen, weights=sizes.astype(np.float64) ** 2, minlength=count)
    place_of = np.empty(count, dtype=np.int64)
    place_of[np.argsort(-squares, kind="stable")] = np.arange(count)
    return Packing(place_of[chosen], count, int(np.bincount(chosen, weights=sizes).max()))


def deal_longest_first(sizes: np.ndarray, num_bins: int) -> np.ndarray:
    """Puts items into bins: largest first, each into the bin that holds least, of several the first.

    Args:
        sizes: [n] int64.
        num_bins: bins.

    Returns:
        [n] int64, bin of each item.

    Source: Graham, "Bounds on multiprocessing timing anomalies", 1969: the fullest bin is at most 4/3 of the best.
    """
    result = np.empty(sizes.size, dtype=np.int64)
    bins = [(0, i) for i in range(num_bins)]
    values = sizes.tolist()
    for item in np.argsort(-sizes, kind="stable").tolist():
        load, place = bins[0]
        result[item] = place
        heapq.heapreplace(bins, (load + values[item], place))
    return result


def pack_first_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Packs items into bins: largest first, each into the first bin with room, a new bin when there is none.

    Items of one size fill the bins in order, so a whole size is placed at once: the cost follows the number of
    different sizes, not of items.

    Args:
        sizes: [n] int64, each 1 .. capacity.
        capacity: room of a bin.

    Returns:
        [n] int64, bin of each item; items of equal size keep their order.

    Source: Johnson, "Near-optimal bin packing algorithms", 1973: at most 11/9 of the best number of bins, plus one.
    """
    result = np.empty(sizes.size, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    free = np.empty(0, dtype=np.int64)
    placed = 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        room = free // size
        missing = count - int(room.sum())
        if missing > 0:
            new_bins = -(-missing // (capacity // size))
            free = np.concatenate([free, np.full(new_bins, capacity, dtype=np.int64)])
            room = free // size
        taken = np.diff(np.minimum(np.cumsum(room), count), prepend=0)
        result[order[placed : placed + count]] = np.repeat(np.arange(free.size), taken)
        free -= taken * size
        placed += count
    return result
