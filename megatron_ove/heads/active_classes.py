"""Which classes take part in a step: its positives, and negatives drawn at random for each of several class sets.

The draw is a function of a key over the rows of the *whole* table and every rank makes it alike, so neither sets nor
losses depend on how many ranks share the table. Negatives of all sets are drawn as one union, the rows that come first
in a keyed permutation. A rank asks the permutation about its own rows only, so its cost follows its share of the table,
or the union where that is smaller, and it knows its active rows to the last one.

Choosing rows is the host's work and can be done ahead of the step; what a row counts in each set is worked out on the
device, without waiting for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_ove.heads.keyed_permutation import KeyedPermutation
from megatron_ove.parallel.host_tensors import host_tensor
from megatron_ove.parallel.random import mix64, stateless_seed

_HALF_BITS = 32


@dataclass(frozen=True)
class NegativeDraw:
    """Negatives of one step: every row is in each of `num_sets` sets with `probability`, independently.

    Attributes:
        num_rows: of the whole table.
        size: rows in the union, those in at least one set.
        probability: of a row to be in a set.
        num_sets: s.
        key: decides the draw.
    """

    num_rows: int
    size: int
    probability: float
    num_sets: int
    key: int

    def contains(self, rows: np.ndarray) -> np.ndarray:
        """Returns whether rows of the whole table are in the union, bool of their shape; False for what is no row."""
        is_row = (rows >= 0) & (rows < self.num_rows)
        if self.size in (0, self.num_rows):
            return is_row if self.size else np.zeros_like(is_row)
        return is_row & (self._permutation.positions_of(np.where(is_row, rows, 0)) < self._cutoff)

    def rows_between(self, start: int, stop: int) -> np.ndarray:
        """Returns the rows of the union in `start` .. `stop` - 1, ascending, int64."""
        if self.size in (0, self.num_rows):
            return np.arange(start, stop if self.size else start)
        return self._by_position(start, stop) if self.size < stop - start else self._by_row(start, stop)

    def share_with(self, num_positives: int) -> float:
        """Returns the share of the whole table that the union and so many other rows make up on average, in (0, 1]."""
        kept = (1 - self.size / self.num_rows) * (1 - num_positives / self.num_rows)
        return max(1 - kept, 1 / self.num_rows)

    def membership(self, rows: Tensor) -> Tensor:
        """Returns the sets that rows of the union are in, [..., s] bool; meaningless for rows outside it.

        Given that a row is in some set, set j contains it with `probability`, or more if none before j does.
        """
        if self.num_sets == 1:
            return torch.ones(*rows.shape, 1, dtype=torch.bool, device=rows.device)
        base = mix64(rows, stateless_seed(self.key, "sets"))
        bits = mix64(
            base[..., None] + torch.arange(0, self.num_sets, 2, device=rows.device)
        )  # enough for two sets each
        low = (1 << _HALF_BITS) - 1
        uniform = torch.stack([bits & low, (bits >> _HALF_BITS) & low], dim=-1).flatten(-2)[..., : self.num_sets]
        # With s - j sets to come, a row that is in none before set j is in it with a chance that makes up for that.
        if_first = [
            _threshold(self.probability / union_share(self.probability, remaining))
            for remaining in range(self.num_sets, 0, -1)
        ]
        thresholds = host_tensor(np.array(if_first), rows.device).to(rows.device, non_blocking=True)
        is_in_if_first = uniform < thresholds
        has_any_before = is_in_if_first.cumsum(-1) > is_in_if_first
        return torch.where(has_any_before, uniform < _threshold(self.probability), is_in_if_first)

    @cached_property
    def _permutation(self) -> KeyedPermutation:
        return KeyedPermutation(self.num_rows, self.key)

    @cached_property
    def _cutoff(self) -> int:
        """Positions before it hold the union, and those points of the permutation that are no rows of the table."""
        beyond = np.arange(self.num_rows, self._permutation.num_points)
        positions = np.sort(self._permutation.positions_of(beyond))
        rows_before = positions - np.arange(len(positions))
        return self.size + int(np.count_nonzero(rows_before < self.size))

    def _by_position(self, start: int, stop: int) -> np.ndarray:
        """Goes through the union."""
        points = self._permutation.points_at(np.arange(self._cutoff))
        return np.sort(points[(points >= start) & (points < min(stop, self.num_rows))])

    def _by_row(self, start: int, stop: int) -> np.ndarray:
        """Goes through the rows asked for."""
        rows = np.arange(start, stop)
        return rows[self._permutation.positions_of(rows) < self._cutoff]


def _threshold(probability: float) -> int:
    return round(probability * (1 << _HALF_BITS))


def draw_negatives(num_rows: int, *, probability: float, num_sets: int, key: int) -> NegativeDraw:
    """Draws the negatives of a step.

    The union has round(num_rows * (1 - (1 - probability) ** num_sets)) rows: a single set has exactly its share.

    Args:
        num_rows: of the whole table.
        probability: of a row to be in a set; 1 = every row, and then one set stands for all.
        num_sets: independent sets.
        key: decides the draw.
    """
    if probability >= 1:
        return NegativeDraw(num_rows, num_rows, 1.0, 1, key)
    return NegativeDraw(num_rows, round(union_share(probability, num_sets) * num_rows), probability, num_sets, key)


def union_share(probability: float, num_sets: int) -> float:
    """Returns the chance of a row to be in at least one of `num_sets` sets."""
    return 1.0 if probability >= 1 else -math.expm1(num_sets * math.log1p(-probability))


def expect_active_rows(num_classes: int, num_rows: int, *, probability: float, num_sets: int, num_labels: int) -> float:
    """Returns how many rows of a shard are active in a step on average.

    Args:
        num_classes: rows of the whole table.
        num_rows: of the shard.
        probability: of a row to be in a set.
        num_sets: independent sets.
        num_labels: of the step, over all replicas; they are taken to fall anywhere.
    """
    drawn = union_share(probability, num_sets)
    labelled = -math.expm1(num_labels * math.log1p(-1 / num_classes))
    return num_rows * (drawn + (1 - drawn) * labelled)


@dataclass(frozen=True)
class StepPositives:
    """The labels of a step, each once for every class set that it is a positive of.

    Attributes:
        keys: [p] int64, ascending: row of the whole table * s + class set.
        num_sets: s.
    """

    keys: np.ndarray
    num_sets: int

    def rows_between(self, start: int, stop: int) -> np.ndarray:
        """Returns the labels in `start` .. `stop` - 1 of the whole table, ascending, each once, int64."""
        return _without_repeats(self.keys_between(start, stop) // self.num_sets)

    def keys_between(self, start: int, stop: int) -> np.ndarray:
        """Returns the keys of rows `start` .. `stop` - 1."""
        first, last = np.searchsorted(self.keys, [start * self.num_sets, stop * self.num_sets])
        return self.keys[first:last]


def collect_positives(labels: np.ndarray, set_of_slot: np.ndarray, num_sets: int) -> StepPositives:
    """Returns the positives of a step.

    Args:
        labels: [n, k] int64, rows of the whole table, of all samples of the step; -1 = none.
        set_of_slot: [k] int64, the class set of each label slot.
        num_sets: s.
    """
    keys = np.sort((labels * num_sets + set_of_slot)[labels >= 0])  # np.unique hashes, which takes 30 times as long
    return StepPositives(_without_repeats(keys), num_sets)


def _without_repeats(ordered: np.ndarray) -> np.ndarray:
    """Drops repeated ones of ascending numbers >= 0."""
    return ordered[np.diff(ordered, prepend=-1) > 0]


@dataclass(frozen=True)
class ChosenRows:
    """The active rows of one rank, on the host.

    Attributes:
        rows: [a] int64, ascending row indices within the rank's shard.
        is_drawn: [a] bool, whether a row is a negative of the step; the others are labels only.
        positives: [q] int64, places in a flattened [a, s] of the rows' labels, at the class sets that they belong to.
        first_row: of the rank in the whole table.
    """

    rows: Tensor
    is_drawn: Tensor
    positives: Tensor
    first_row: int


def choose_active_rows(
    draw: NegativeDraw, positives: StepPositives, *, first_row: int, num_rows: int, device: torch.device
) -> ChosenRows:
    """Cuts a draw to one rank's rows and adds the step's labels among them; touches no device.

    Args:
        draw: negatives over the whole table.
        positives: labels over the whole table.
        first_row: first row of the rank.
        num_rows: rows of the rank.
        device: where the result will be copied to.
    """
    stop = first_row + num_rows
    drawn, labels = draw.rows_between(first_row, stop), positives.rows_between(first_row, stop)
    only_labels = labels[~draw.contains(labels)]
    places = np.searchsorted(drawn, only_labels)
    rows = np.insert(drawn, places, only_labels)
    is_drawn = np.insert(np.ones(len(drawn), dtype=bool), places, False)
    row, class_set = np.divmod(positives.keys_between(first_row, stop), positives.num_sets)
    flat_places = np.searchsorted(rows, row) * positives.num_sets + class_set
    return ChosenRows(
        *(host_tensor(array, device) for array in (rows - first_row, is_drawn, flat_places)), first_row=first_row
    )


@dataclass(frozen=True)
class ActiveRows:
    """The active rows of one rank and what they count in each class set.

    Attributes:
        rows: [a] int64, ascending row indices within the rank's shard.
        weights: [a, s] fp32, factor of the row's exponential in the sum of each set: 0 = not in it; 1; or 1 /
            probability for drawn negatives when sampling is corrected for.
    """

    rows: Tensor
    weights: Tensor

    def positions_of(self, rows: Tensor) -> Tensor:
        """Returns where rows of the shard lie in `rows`, -1 for those that are not active; shape of the argument."""
        return find(self.rows, rows)


def weigh_active_rows(
    chosen: ChosenRows, draw: NegativeDraw, *, device: torch.device, corrects_sampling: bool = False
) -> ActiveRows:
    """Brings chosen rows to the device and works out what they count there; waits for nothing.

    Args:
        chosen: rows of this rank.
        draw: that they were chosen from.
        device: of the result.
        corrects_sampling: whether a drawn negative counts 1 / probability, which makes each set's sum an unbiased
            estimate of the sum over the whole table (Horvitz and Thompson, JASA 1952). Positives count 1.
    """
    rows, is_drawn, positives = (
        tensor.to(device, non_blocking=True) for tensor in (chosen.rows, chosen.is_drawn, chosen.positives)
    )
    weight = 1 / draw.probability if corrects_sampling else 1.0
    weights = (draw.membership(rows + chosen.first_row) & is_drawn[:, None]) * weight
    weights.view(-1).index_fill_(0, positives, 1.0)
    return ActiveRows(rows, weights)


def find(ordered: Tensor, values: Tensor) -> Tensor:
    """Returns where each value lies in `ordered`, ascending, -1 = nowhere; int64 of the shape of `values`."""
    if ordered.numel() == 0:
        return torch.full_like(values, -1)
    place = torch.searchsorted(ordered, values.contiguous()).clamp_(max=ordered.numel() - 1)
    return place.masked_fill(ordered[place] != values, -1)
