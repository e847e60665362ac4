"""How much of the gradient is reduced at a time where reduction overlaps with the backward pass."""

from __future__ import annotations

_SMALLEST, _PER_DATA_RANK = 40_000_000, 1_000_000


def bucket_size(data_size: int) -> int:
    """Returns the elements after which a bucket is full; a ring of many data ranks needs longer messages.

    Source: megatron-core's default.
    """
    return max(_SMALLEST, _PER_DATA_RANK * data_size)
