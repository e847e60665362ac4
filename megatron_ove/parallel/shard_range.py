"""Contiguous, nearly equal ranges: which rows, classes or samples belong to which rank."""

from __future__ import annotations


def shard_range(total: int, size: int, rank: int) -> tuple[int, int]:
    """Returns the half-open range of `total` items that belongs to `rank` of `size`.

    Ranges are contiguous, in rank order, cover everything, and differ in length by at most one; the first
    `total % size` ranks get the longer ones. A rank's range may be empty.

    Args:
        total: number of items, >= 0.
        size: number of ranks, >= 1.
        rank: 0 <= rank < size.

    Returns:
        (start, stop).

    Raises:
        ValueError: an argument is outside its range.
    """
    if total < 0 or size < 1 or not 0 <= rank < size:
        raise ValueError(f"shard_range(total={total}, size={size}, rank={rank}): need total >= 0 and 0 <= rank < size")
    share, longer = divmod(total, size)
    start = rank * share + min(rank, longer)
    return start, start + share + (rank < longer)
