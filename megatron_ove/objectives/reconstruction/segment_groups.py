"""Which of a microbatch's tokens an objective reconstructs: the pictures of its sources, those of one size together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_ove.batch import PatchPack, Samples
from megatron_ove.parallel.host_tensors import host_tensor
from megatron_ove.parallel.row_blocks import concatenate_ranges

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class SegmentGroup:
    """Pictures of one size.

    Attributes:
        rows: [count * length] int64, their patches in the pack, picture after picture.
        count: pictures.
        length: patches of each.
        grid: (t, h, w) patches; 0 in all three where the patches are no full grid.
        shown: the grid that a teacher sees; `grid` where it sees what the student sees.
    """

    rows: Tensor
    count: int
    length: int
    grid: Grid
    shown: Grid

    @property
    def is_scaled(self) -> bool:
        return self.grid != self.shown


@dataclass(frozen=True)
class SegmentGroups:
    """All pictures that an objective reads of a microbatch.

    Attributes:
        groups: one after the other; nothing of a picture lies in two.
    """

    groups: tuple[SegmentGroup, ...]

    @property
    def num_tokens(self) -> int:
        return sum(group.count * group.length for group in self.groups)

    def to(self, device: torch.device) -> SegmentGroups:
        """Returns the groups with their rows on the device."""
        return SegmentGroups(
            tuple(replace(group, rows=group.rows.to(device, non_blocking=True)) for group in self.groups)
        )

    def rows(self, device: torch.device) -> Tensor:
        """Returns [n] int64, the patches of all groups, one group after the other."""
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return torch.cat([group.rows for group in self.groups]) if self.groups else empty


def group_segments(
    samples: Samples,
    pack: PatchPack,
    sources: tuple[str, ...],
    device: torch.device,
    shown: Callable[[Grid], Grid] = lambda grid: grid,
) -> SegmentGroups:
    """Finds the pictures of samples that could be read.

    Args:
        samples: of the microbatch.
        pack: of the microbatch.
        sources: whose samples are read.
        device: of the model.
        shown: grid -> the grid that a teacher sees of such a picture.
    """
    is_own = torch.zeros(len(samples), dtype=torch.bool)
    is_own[samples.of(*sources)] = True
    of_segments = (is_own & samples.is_valid)[pack.sample.long()].numpy()
    chosen = np.flatnonzero(of_segments)
    bounds = pack.cu_seqlens.numpy().astype(np.int64)
    firsts, lengths, grids = bounds[:-1][chosen], np.diff(bounds)[chosen], pack.grids.numpy()[chosen]
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, key in enumerate(np.column_stack([lengths, grids]).tolist()):
        groups.setdefault(tuple(key), []).append(place)
    found = []
    for (length, *grid), places in groups.items():
        size: Grid = (grid[0], grid[1], grid[2])
        rows = concatenate_ranges(firsts[places], lengths[places])
        found.append(SegmentGroup(host_tensor(rows, device), len(places), length, size, shown(size)))
    return SegmentGroups(tuple(found))
