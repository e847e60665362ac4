"""Where a class lies in its table: ids are striped over it, so that every contiguous range of rows is a fair sample.

Vocabularies are sorted by frequency, and ranks hold contiguous ranges of rows. Row = (id * m) mod num_classes with m
near num_classes / golden ratio puts consecutive ids far apart and spreads any run of ids evenly over all ranges
(Fibonacci hashing: Knuth, The Art of Computer Programming 3, 6.4). It does not depend on the number of ranks, so a
checkpoint can be read by any.
"""

from __future__ import annotations

import math

from torch import Tensor

_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def rows_of_classes(classes: Tensor, num_classes: int) -> Tensor:
    """Returns the rows of class ids, same shape, int64; negative ids (no label) stay as they are."""
    classes = classes.long()
    return (classes * _multiplier(num_classes) % num_classes).where(classes >= 0, classes)


def classes_of_rows(rows: Tensor, num_classes: int) -> Tensor:
    """Returns the class ids that lie in `rows` (of the whole table), same shape, int64."""
    return rows.long() * pow(_multiplier(num_classes), -1, num_classes) % num_classes


def _multiplier(num_classes: int) -> int:
    """The number nearest to num_classes / golden ratio that has no common divisor with it."""
    nearest = round(num_classes / _GOLDEN_RATIO)
    candidates = (nearest + sign * distance for distance in range(num_classes) for sign in (1, -1))
    return next(m for m in candidates if math.gcd(m, num_classes) == 1)
