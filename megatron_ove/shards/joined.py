"""Several shard sets seen as one, one after the other: what a source with a list of paths reads.

Meant for tens of sets. Thousands of parts are joined on disk instead (`merge.py`), where each rank opens one index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.shards import format as layout
from megatron_ove.shards import index as files
from megatron_ove.shards.format import DatasetInfo
from megatron_ove.shards.index import ShardIndex
from megatron_ove.vocabulary import VOCABULARY_FILE


class Pieces:
    """Arrays with one row a sample that lie one after the other, without copying them into one.

    Attributes:
        shape: as of one array.
        dtype: of all of them.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = tuple(arrays)
        self._firsts = np.cumsum([0, *map(len, arrays)])
        self.shape = (int(self._firsts[-1]), *arrays[0].shape[1:])
        self.dtype = np.result_type(*arrays)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, int | np.integer):
            piece, row = place_of(self._firsts, int(rows))
            return self._arrays[piece][row]
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise TypeError(f"rows are asked for by number, a slice, or [n] integers, not {rows.dtype} {rows.shape}")
        found = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        pieces = np.searchsorted(self._firsts, rows, side="right") - 1
        for piece in np.unique(pieces).tolist():
            mine = pieces == piece
            found[mine] = self._arrays[piece][rows[mine] - self._firsts[piece]]
        return found

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        del copy
        return np.concatenate(self._arrays).astype(dtype or self.dtype)


def place_of(firsts: np.ndarray, row: int) -> tuple[int, int]:
    """Returns which piece a row is in, and which row of it."""
    piece = int(np.searchsorted(firsts, row, side="right")) - 1
    return piece, row - int(firsts[piece])


class JoinedIndex(ShardIndex):
    """The indexes of several sets; shards are numbered through."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        """
        Args:
            indexes: in their order.

        Raises:
            DataError: they are no one set; one sentence a line.
        """
        self._indexes = tuple(indexes)
        info = _common_info(indexes)
        in_memory = tuple(files.SIZE_COLUMNS)
        shared = set.intersection(*(set(index.columns) for index in indexes)) - {"offset", "offsets", "sizes", "shard"}
        columns: dict[str, Any] = {}
        for name in shared:
            arrays = [index.columns[name] for index in indexes]
            columns[name] = np.concatenate(arrays) if name in in_memory else Pieces(arrays)
        super().__init__(info, indexes[0].directory, columns)
        self._first_rows = np.cumsum([0, *(index.info.num_samples for index in indexes)])
        self._shard_rows = [index.shard_rows() for index in indexes]
        self._first_shards = np.cumsum([0, *(max(rows) + 1 for rows in self._shard_rows)])
        if info.has_pages:
            pages = np.cumsum([0, *(index.info.num_pages for index in indexes)])
            ends = [index.first_page[:-1] + first for index, first in zip(indexes, pages, strict=False)]
            self._first_page = np.concatenate([*ends, pages[-1:]])
            self._page_widths = np.concatenate([index.page_widths for index in indexes])
            self._page_heights = np.concatenate([index.page_heights for index in indexes])

    @property
    def first_page(self) -> np.ndarray:
        return self._first_page

    @property
    def page_widths(self) -> np.ndarray:
        return self._page_widths

    @property
    def page_heights(self) -> np.ndarray:
        return self._page_heights

    def key(self, row: int) -> str:
        piece, own = place_of(self._first_rows, row)
        return self._indexes[piece].key(own)

    def page_range(self, row: int) -> range:
        if not self.info.has_pages:
            return range(0)
        return range(int(self._first_page[row]), int(self._first_page[row + 1]))

    def shard_of(self, row: int) -> int:
        piece, own = place_of(self._first_rows, row)
        return int(self._first_shards[piece]) + self._indexes[piece].shard_of(own)

    def shard_path(self, shard: int) -> Path:
        piece, own = place_of(self._first_shards, shard)
        return self._indexes[piece].shard_path(own)

    def shard_end(self, shard: int) -> int:
        piece, own = place_of(self._first_shards, shard)
        return self._indexes[piece].shard_end(own)

    def shard_rows(self) -> Mapping[int, range]:
        found: dict[int, range] = {}
        for rows, first_row, first_shard in zip(
            self._shard_rows, self._first_rows.tolist(), self._first_shards.tolist(), strict=False
        ):
            found |= {first_shard + k: range(r.start + first_row, r.stop + first_row) for k, r in rows.items()}
        return found

    def place(self, row: int, member: str) -> tuple[int, int]:
        piece, own = place_of(self._first_rows, row)
        return self._indexes[piece].place(own, member)


def _common_info(indexes: Sequence[ShardIndex]) -> DatasetInfo:
    first, problems = indexes[0], []
    for index in indexes[1:]:
        difference = index.info.difference_from(first.info)
        if difference:
            name, here, there = difference
            problems.append(f"{index.directory} has {name} = {here}, but {first.directory} has {there}")
        elif _words(index) != _words(first):
            problems.append(
                f"{VOCABULARY_FILE} of {index.directory} differs from that of {first.directory}, so equal labels "
                "mean different words"
            )
    if problems:
        advice = "so they are no one source; write them alike, or make a source of each"
        raise DataError("\n".join(f"{problem}, {advice}" for problem in problems))
    infos = [index.info for index in indexes]
    return replace(
        first.info,
        num_samples=sum(info.num_samples for info in infos),
        num_pages=sum(info.num_pages for info in infos),
        most_pages=max(info.most_pages for info in infos),
        columns={name: kind for name, kind in infos[-1].columns.items() if all(name in info.columns for info in infos)},
        format_version=layout.FORMAT_VERSION,
        num_parts=0,
    )


def _words(index: ShardIndex) -> bytes | None:
    path = index.directory / VOCABULARY_FILE
    return path.read_bytes() if path.is_file() else None
