"""Which classes take part in a step: its positives, and negatives drawn at random for each of several class sets.

The draw is a function of a key over the rows of the *whole* table and every rank makes it alike, so neither sets nor
losses depend on how many ranks share the table. Negatives of all sets are drawn as one union, read off a keyed
permutation: the cost follows the union, not the table, and nothing as long as the table is sorted or shuffled. Nothing
here waits for a device: on CUDA shapes are fixed in advance and padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ove.parallel.random import mix64, stateless_seed

# Luby and Rackoff: four rounds of a random function make a pseudo-random permutation.
_FEISTEL_ROUNDS = 4
_HALF_BITS = 32


@dataclass(frozen=True)
class NegativeDraw:
    """Negatives of one step: every row is in each of `num_sets` sets with `probability`, independently.

    Attributes:
        num_rows: of the whole table.
        union: [n] int64, ascending rows of the whole table that are in at least one set. Their number is fixed at
            round(num_rows * (1 - (1 - probability) ** num_sets)), so that a single set has exactly its share.
        probability: of a row to be in a set.
        num_sets: s.
        key: decides the draw.
    """

    num_rows: int
    union: Tensor
    probability: float
    num_sets: int
    key: int

    def contains(self, rows: Tensor) -> Tensor:
        """Returns whether rows of the whole table are in the union, bool of their shape."""
        return find(self.union, rows) >= 0

    def share_with(self, labels: Tensor) -> float:
        """Returns the share of the whole table that the union and these labels make up on average, in (0, 1].

        Args:
            labels: rows of the whole table on the CPU, any shape; -1 = none.
        """
        num_positives = int((labels.unique() >= 0).sum())
        kept = (1 - self.union.numel() / self.num_rows) * (1 - num_positives / self.num_rows)
        return max(1 - kept, 1 / self.num_rows)

    def membership(self, rows: Tensor) -> Tensor:
        """Returns the sets that rows of the union are in, [..., s] bool; meaningless for rows outside it.

        Given that a row is in some set, set j contains it with `probability`, or more if none before j does.
        """
        if self.num_sets == 1:
            return torch.ones(*rows.shape, 1, dtype=torch.bool, device=rows.device)
        base = mix64(rows, stateless_seed(self.key, "sets"))
        has_any = torch.zeros_like(rows, dtype=torch.bool)
        sets = []
        for index in range(self.num_sets):
            if index % 2 == 0:
                bits = mix64(base + index)
            uniform = (bits >> (index % 2 * _HALF_BITS)) & ((1 << _HALF_BITS) - 1)
            remaining = self.num_sets - index
            if_first = self.probability / -math.expm1(remaining * math.log1p(-self.probability))
            threshold = torch.where(has_any, self._threshold(self.probability), self._threshold(if_first))
            sets.append(uniform < threshold)
            has_any = has_any | sets[-1]
        return torch.stack(sets, dim=-1)

    @staticmethod
    def _threshold(probability: float) -> int:
        return round(probability * (1 << _HALF_BITS))


@dataclass(frozen=True)
class ActiveRows:
    """The active rows of one rank and what they count in each class set.

    Attributes:
        rows: [a] int64, ascending row indices within the rank's shard; entries equal to the number of rows are padding.
        weights: [a, s] fp32, factor of the row's exponential in the sum of each set: 0 = not in it; 1; or 1 /
            probability for drawn negatives when sampling is corrected for.
        num_rows: rows of the shard.
    """

    rows: Tensor
    weights: Tensor
    num_rows: int

    def positions_of(self, rows: Tensor) -> Tensor:
        """Returns where rows of the shard lie in `rows`, -1 for those that are not active; shape of the argument."""
        place = find(self.rows, rows)
        return place.masked_fill((rows < 0) | (rows >= self.num_rows), -1)


def find(ordered: Tensor, values: Tensor) -> Tensor:
    """Returns where each value lies in `ordered`, ascending, -1 = nowhere; int64 of the shape of `values`."""
    if ordered.numel() == 0:
        return torch.full_like(values, -1)
    place = torch.searchsorted(ordered, values.contiguous()).clamp_(max=ordered.numel() - 1)
    return place.masked_fill(ordered[place] != values, -1)


def draw_negatives(
    num_rows: int, *, probability: float, num_sets: int, key: int, device: torch.device | None = None
) -> NegativeDraw:
    """Draws the negatives of a step.

    Args:
        num_rows: of the whole table.
        probability: of a row to be in a set; 1 = every row, and then one set stands for all.
        num_sets: independent sets.
        key: decides the draw.
        device: of the result.
    """
    if probability >= 1:
        return NegativeDraw(num_rows, torch.arange(num_rows, device=device), 1.0, 1, key)
    share = -math.expm1(num_sets * math.log1p(-probability))
    size = round(share * num_rows)
    width = math.isqrt(num_rows - 1) + 1
    height = -(-num_rows // width)
    # At worst every point beyond the table lies among the first ones.
    candidates = torch.arange(size + width * height - num_rows, device=device)
    candidates = _permute(candidates, width, height, key)
    is_row = candidates < num_rows
    if candidates.is_cuda:  # the same rows, by a sort instead of a selection whose size the host would wait for
        candidates = candidates.gather(0, is_row.logical_not().byte().argsort(stable=True))
    else:
        candidates = candidates[is_row]
    return NegativeDraw(num_rows, candidates[:size].sort().values, probability, num_sets, key)


def _permute(positions: Tensor, width: int, height: int, key: int) -> Tensor:
    """Keyed permutation of 0 .. width * height - 1: a Feistel network on (column, row) with modular additions."""
    column, row = positions % width, positions // width
    for round_index in range(_FEISTEL_ROUNDS):
        round_key = stateless_seed(key, round_index)
        if round_index % 2 == 0:
            column = (column + mix64(row ^ round_key) % width) % width
        else:
            row = (row + mix64(column ^ round_key) % height) % height
    return row * width + column


def select_active_rows(
    draw: NegativeDraw,
    labels: Tensor,
    set_of_slot: Tensor,
    *,
    first_row: int,
    num_rows: int,
    corrects_sampling: bool = False,
) -> ActiveRows:
    """Cuts a draw to one rank's rows and adds the step's positives.

    Args:
        draw: negatives over the whole table.
        labels: [n, k] int64, rows of the whole table, of all samples of the step; -1 = none.
        set_of_slot: [k] int64, the class set of each label slot.
        first_row: first row of the rank.
        num_rows: rows of the rank.
        corrects_sampling: whether a drawn negative counts 1 / probability, which makes each set's sum an unbiased
            estimate of the sum over the whole table (Horvitz and Thompson, JASA 1952). Positives count 1.
    """
    # A row that was drawn sorts before the same row as a positive; the lowest bit tells which it was.
    marked = torch.cat([draw.union * 2, labels.flatten() * 2 + 1]) - 2 * first_row
    outside = (marked < 0) | (marked >= 2 * num_rows)
    if marked.is_cuda:
        capacity = _capacity(draw, labels.numel(), num_rows)
        marked = marked.masked_fill(outside, 2 * num_rows).sort().values
        marked = marked.masked_fill(_is_repeated(marked), 2 * num_rows).sort().values[:capacity]
    else:
        marked = marked[~outside].sort().values
        marked = marked[~_is_repeated(marked)]
    rows = marked >> 1
    is_drawn = (marked & 1 == 0) & (rows < num_rows)
    weight = 1 / draw.probability if corrects_sampling else 1.0
    weights = torch.zeros(rows.numel() + 1, draw.num_sets, device=rows.device)
    weights[:-1] = (draw.membership(rows + first_row) & is_drawn[:, None]) * weight
    active = ActiveRows(rows, weights[:-1], num_rows)
    places = active.positions_of(labels - first_row)
    weights[places.flatten(), set_of_slot.expand_as(places).flatten()] = 1.0  # -1, the row beyond, takes the others
    return active


def _capacity(draw: NegativeDraw, num_positives: int, num_rows: int) -> int:
    """Active rows that a rank provides for when it cannot ask how many there are: the mean + 8 standard deviations."""
    mean = draw.union.numel() * num_rows / draw.num_rows
    return min(num_rows, math.ceil(mean + 8 * math.sqrt(mean)) + num_positives)


def _is_repeated(ordered: Tensor) -> Tensor:
    rows = ordered >> 1
    return torch.cat([rows.new_zeros(1, dtype=torch.bool), rows[1:] == rows[:-1]])[: rows.numel()]
