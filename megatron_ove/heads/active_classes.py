"""Which classes take part in a step: its positives, and negatives drawn at random without replacement.

The draw is a function of (key, positives) over *global* class ids and every rank makes it alike, so the set does not
depend on how many ranks share the table. Negatives are read off a keyed permutation of all class ids, one after the
other: the cost follows the set, not the table, and nothing is sorted or shuffled that is as long as the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ove.parallel.random import mix64, stateless_seed

# Luby and Rackoff: four rounds of a random function make a pseudo-random permutation.
_FEISTEL_ROUNDS = 4


@dataclass(frozen=True)
class ActiveRows:
    """The active rows of one rank: the union of the step's class sets, cut to the rank's class range.

    Attributes:
        rows: [a] int64, ascending row indices within the rank's shard.
        members: per class set [a_s] int64, ascending positions in `rows` of the set's classes.
        member_splits: per class set, how many of its members lie before each chunk boundary 0, chunk_size, ... , a.
        chunk_size: rows per chunk.
    """

    rows: Tensor
    members: tuple[Tensor, ...]
    member_splits: tuple[tuple[int, ...], ...]
    chunk_size: int

    def positions_of(self, classes: Tensor, first_class: int) -> Tensor:
        """Returns where classes lie in `rows`, -1 for those that are not active on this rank; shape of `classes`."""
        local = classes - first_class
        if self.rows.numel() == 0:
            return torch.full_like(local, -1)
        place = torch.searchsorted(self.rows, local.contiguous()).clamp_(max=self.rows.numel() - 1)
        return torch.where(self.rows[place] == local, place, -1)


def draw_class_set(positives: Tensor, *, num_classes: int, num_active: int, key: int) -> Tensor:
    """Returns the positives and random other classes, `num_active` in all; more only if there are more positives.

    Args:
        positives: [p] int64, distinct class ids.
        num_classes: of the whole table.
        num_active: size of the set asked for, at most `num_classes`.
        key: decides the negatives, together with the positives.

    Returns:
        [max(num_active, p)] int64, ascending.
    """
    if num_active >= num_classes:
        return torch.arange(num_classes, device=positives.device)
    num_negatives = num_active - positives.numel()
    if num_negatives <= 0:
        return positives.sort().values
    width = math.isqrt(num_classes - 1) + 1
    height = -(-num_classes // width)
    # At worst every positive and every point beyond the table lies among the first ones.
    num_candidates = num_negatives + positives.numel() + width * height - num_classes
    candidates = _permute(torch.arange(num_candidates, device=positives.device), width, height, key)
    usable = (candidates < num_classes) & ~torch.isin(candidates, positives)
    return torch.cat([positives, candidates[usable][:num_negatives]]).sort().values


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


def select_active_rows(class_sets: Sequence[Tensor], *, first_class: int, num_rows: int, chunk_size: int) -> ActiveRows:
    """Cuts the step's class sets to one rank's range and forms their union.

    Args:
        class_sets: per set the global class ids, int64, ascending.
        first_class: first class of the rank.
        num_rows: classes of the rank.
        chunk_size: rows per chunk of the softmax.
    """
    local = []
    for classes in class_sets:
        inside = (classes >= first_class) & (classes < first_class + num_rows)
        local.append(classes[inside] - first_class)
    rows = local[0] if len(local) == 1 else torch.cat(local).unique()
    members = tuple(torch.searchsorted(rows, part) for part in local)
    boundaries = [*range(0, rows.numel(), chunk_size), rows.numel()]
    edges = torch.tensor(boundaries, device=rows.device)
    splits = tuple(tuple(torch.searchsorted(part, edges).tolist()) for part in members)
    return ActiveRows(rows, members, splits, chunk_size)
