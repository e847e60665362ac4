"""How a step's samples are divided into microbatches: few, equally long and equally costly, the same on every rank.

First-fit decreasing says how many microbatches the token budget needs; rounded up to whole rows of replicas, all of
them are used. Samples are then dealt out longest first, each to the emptiest microbatch, so that all are almost equally
long and hold much the same mixture. Last, microbatches are put in order of their cost, so that those which replicas
compute at the same time take equally long.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MORE_BINS = 20
"""Dealing is tried with up to a twentieth more bins than the tightest budget needs."""
_TRIALS = 100
"""Numbers of bins that are tried differ by a hundredth."""
_CAREFUL = 1 << 21
"""Items x bins up to which dealing compares every bin for every item: a tenth of a second."""
_GROUP = 2048
"""Items that first-fit packs together."""
_ROUNDING = 1e-9
"""Shares that fill a bin add up to 1 within rounding."""


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


@dataclass(frozen=True)
class Budget:
    """Something else that microbatches have limited room for, like tokens of texts.

    Attributes:
        sizes: [n] int64, what each sample takes of it, 0 .. capacity.
        capacity: of a microbatch.
    """

    sizes: np.ndarray
    capacity: int


def pack_samples(sizes: np.ndarray, *, capacity: int, multiple: int, others: Sequence[Budget] = ()) -> Packing:
    """Divides samples into microbatches; microbatch j is the (j // multiple)-th of its row.

    Args:
        sizes: [n] int64 patches of each sample, each 1 .. capacity; n may not be 0.
        capacity: most patches of a microbatch.
        multiple: microbatches are as many as first-fit decreasing needs, rounded up to a multiple of this. A microbatch
            is empty only where there are fewer samples than microbatches.
        others: further budgets that each microbatch keeps.
    """
    if others:
        chosen, count = _divide_by_all([Budget(sizes, capacity), *others], multiple)
    else:
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


def _divide_by_all(budgets: Sequence[Budget], multiple: int) -> tuple[np.ndarray, int]:
    """Returns (bin of each item [n] int64, bins): as many as the tightest budget needs alone if dealing finds room in
    them for all, else a few more."""
    shares = np.stack([one.sizes / one.capacity for one in budgets], axis=1)
    needs = [pack_first_fit_decreasing(one.sizes[one.sizes > 0], one.capacity) for one in budgets]
    fewest = -(-(max(int(bins.max(initial=0)) for bins in needs) + 1) // multiple) * multiple
    step = -(-max(1, fewest // _TRIALS) // multiple) * multiple
    first_fit, first_fit_count = None, fewest + 1
    for count in range(fewest, fewest + fewest // _MORE_BINS + step, step):
        if first_fit is not None and first_fit_count <= count:
            break  # dealing makes bins more even, but not at the price of more of them
        is_small = len(shares) * count <= _CAREFUL
        for deal in (deal_fullest_first, _deal_carefully) if is_small else (deal_fullest_first,):
            chosen = deal(shares, count)
            if all(np.bincount(chosen, weights=one.sizes).max() <= one.capacity for one in budgets):
                return chosen, count
        if first_fit is None:
            first_fit = _pack_in_groups(shares)
            first_fit_count = -(-(int(first_fit.max()) + 1) // multiple) * multiple
    assert first_fit is not None
    return first_fit, first_fit_count


def _pack_in_groups(shares: np.ndarray) -> np.ndarray:
    """As `pack_shares`, for any number of items: some thousand at a time, alike in sizes, each into bins of its own, as
    its time grows with items x bins. A group leaves one bin half empty."""
    num_groups = -(-len(shares) // _GROUP)
    result, first_bin = np.empty(len(shares), dtype=np.int64), 0
    order = np.argsort(-shares.max(axis=1), kind="stable")
    for group in range(num_groups):
        mine = order[group::num_groups]
        bins = pack_shares(shares[mine])
        result[mine] = bins + first_bin
        first_bin += int(bins.max()) + 1
    return result


def pack_shares(shares: np.ndarray) -> np.ndarray:
    """Packs items of several sizes into bins: the largest share first, each into the first bin with room for all of it.

    Args:
        shares: [n, d] float, part of a bin that each item takes of each budget, at most 1.

    Returns:
        [n] int64, bin of each item.
    """
    result = np.empty(len(shares), dtype=np.int64)
    free, count = np.empty_like(shares), 0
    for item in np.argsort(-shares.max(axis=1), kind="stable").tolist():
        fits = (free[:count] >= shares[item]).all(axis=1)
        place = int(fits.argmax()) if fits.any() else count
        if place == count:
            free[place], count = 1 + _ROUNDING, count + 1
        free[place] -= shares[item]
        result[item] = place
    return result


def deal_fullest_first(shares: np.ndarray, num_bins: int) -> np.ndarray:
    """As `deal_longest_first` for items of several sizes: each into the bin whose fullest budget is emptiest.

    Args:
        shares: [n, d] float, as for `pack_shares`.
        num_bins: bins.
    """
    result = np.empty(len(shares), dtype=np.int64)
    bins = [(0.0, place, [0.0] * shares.shape[1]) for place in range(num_bins)]
    values = shares.tolist()
    for item in np.argsort(-shares.max(axis=1), kind="stable").tolist():
        _, place, loads = bins[0]
        loads = [load + share for load, share in zip(loads, values[item], strict=True)]
        result[item] = place
        heapq.heapreplace(bins, (max(loads), place, loads))
    return result


def _deal_carefully(shares: np.ndarray, num_bins: int) -> np.ndarray:
    """As `deal_fullest_first`, but each into the bin whose fullest budget stays emptiest with the item in it: fits
    where several budgets are tight, and takes n x bins comparisons."""
    result = np.empty(len(shares), dtype=np.int64)
    loads = np.zeros((num_bins, shares.shape[1]))
    for item in np.argsort(-shares.max(axis=1), kind="stable").tolist():
        place = int((loads + shares[item]).max(axis=1).argmin())
        loads[place] += shares[item]
        result[item] = place
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
