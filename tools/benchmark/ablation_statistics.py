"""Means with 95 % confidence intervals over seeds, and paired differences between variants (Student's t)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """`mean` plus or minus `half_width`; the width is not a number when there is one value."""

    mean: float
    half_width: float

    @property
    def verdict(self) -> str:
        """For a difference: "better", "worse", or "equal" when 0 lies within the interval."""
        if not abs(self.mean) > self.half_width:
            return "equal"
        return "better" if self.mean > 0 else "worse"


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean of independent values and its t-interval."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean, float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1)) * math.sqrt(variance / count))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Returns the interval of `values - baseline` over the seeds that both have.

    Args:
        values: seed -> figure of a variant.
        baseline: seed -> figure of what it is compared with.
    """
    seeds = sorted(values.keys() & baseline.keys())
    return interval([values[seed] - baseline[seed] for seed in seeds])
