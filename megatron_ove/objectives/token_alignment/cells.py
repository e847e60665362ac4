"""`AlignmentInputs`: which cells of the microbatch's maps show which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_ove.batch import PatchPack
from megatron_ove.parallel.host_tensors import host_tensor
from megatron_ove.parallel.row_blocks import concatenate_ranges


@dataclass(frozen=True)
class MapGroup:
    """Maps of pictures of one size.

    Attributes:
        rows: [count * rows * columns] int64, their tokens in the pack, picture after picture.
        grid: (rows, columns) of tokens.
    """

    rows: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class AlignmentInputs:
    """Tokens of a microbatch and the cells that show them; one sample's tokens are neighbours.

    Attributes:
        scale: cells of a token along either axis.
        groups: the maps that have a token; cells are counted through them, picture after picture, row after row.
        cells: [U] int64, ascending: the cells that show a token.
        pair_cells: [M] int64, places in `cells`.
        pair_tokens: [M] int64, ascending: the token that each shows. A cell may show several.
        row_ids: [R] int64, rows of the table.
        row_tokens: [R] int64, ascending: the token that each is a part of.
        identity: [N] int64, equal for equal tokens of a sample.
        lengths: of each sample that has some, how many of the N are its own.
        num_seen: tokens that could be seen, of which N are used.
        num_texts: documents that have a text.
    """

    scale: int
    groups: tuple[MapGroup, ...]
    cells: Tensor
    pair_cells: Tensor
    pair_tokens: Tensor
    row_ids: Tensor
    row_tokens: Tensor
    identity: Tensor
    lengths: list[int]
    num_seen: int
    num_texts: int

    @property
    def num_tokens(self) -> int:
        return len(self.identity)

    def to(self, device: torch.device) -> AlignmentInputs:
        """Returns the inputs with their tensors on the device."""
        names = ("cells", "pair_cells", "pair_tokens", "row_ids", "row_tokens", "identity")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        groups = tuple(replace(group, rows=group.rows.to(device, non_blocking=True)) for group in self.groups)
        return replace(self, groups=groups, **moved)


class MapPlaces:
    """Where the cells of segments lie among those of all maps."""

    def __init__(self, pack: PatchPack, segments: Sequence[int], scale: int, device: torch.device) -> None:
        """
        Args:
            pack: of the microbatch.
            segments: that have a map, each a full grid.
            scale: cells of a token along either axis.
            device: of the model.
        """
        bounds, grids = pack.cu_seqlens.numpy().astype(np.int64), pack.grids.numpy()
        by_grid: dict[tuple[int, int], list[int]] = {}
        for segment in segments:
            by_grid.setdefault((int(grids[segment, 1]), int(grids[segment, 2])), []).append(segment)
        self.first_cell: dict[int, int] = {}
        groups, count = [], 0
        for grid, own in by_grid.items():
            size = grid[0] * grid[1]
            rows = concatenate_ranges(bounds[own], np.full(len(own), size))
            groups.append(MapGroup(host_tensor(rows, device), grid))
            for segment in own:
                self.first_cell[segment] = count
                count += size * scale * scale
        self.groups = tuple(groups)


def map_bounds(inputs: AlignmentInputs) -> Tensor:
    """Returns [maps + 1] int64, the first cell of each map, and the end."""
    sizes = [
        group.grid[0] * group.grid[1] * inputs.scale**2
        for group in inputs.groups
        for _ in range(len(group.rows) // (group.grid[0] * group.grid[1]))
    ]
    return torch.tensor([0, *sizes], dtype=torch.int64, device=inputs.cells.device).cumsum(0)
