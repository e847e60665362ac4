"""The index of a shard set: what is known of a sample without reading it, and where its members lie.

What plans are made of (sizes in pixels, patches, where pages begin) is read into memory, 16 bytes for a sample with one
page: a step takes samples from all over a set, and each would be a cold page of a network disk. All else is mapped, one
record a sample, so that reading a sample takes one page of it. How it lies on disk: docs/data_format.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ove.shards import format as layout
from megatron_ove.shards.arrays import load_array
from megatron_ove.shards.format import DatasetInfo

ROWS, KEYS, SHARDS, PARTS = "rows", "keys", "shards", "parts"
SIZE_COLUMNS = {"width": "<i4", "height": "<i4", "num_patches": "<i4"}
"""What is in memory of pictures and clips."""
PAGE_COUNT = "num_pages"
PAGE_COLUMNS = {"page_width": "<i4", "page_height": "<i4"}
"""What is in memory of pages, one number a page; `PAGE_COUNT` says how many a sample has."""
PAGE_BYTES = "page_bytes"
_CHUNK = 1 << 20
SHARD_TYPE = np.dtype([("first_row", "<u8"), ("end", "<u8")])
"""Of a shard: its first sample, and the byte behind its last member's data."""
INDEX_FILES = (ROWS, KEYS, SHARDS, PARTS, *SIZE_COLUMNS, PAGE_COUNT, *PAGE_COLUMNS, PAGE_BYTES)


def part_type(path_bytes: int) -> np.dtype[Any]:
    """Returns what is known of a part: its folder, relative to the set's, in UTF-8; its first shard and sample."""
    return np.dtype([("path", f"S{max(1, path_bytes)}"), ("first_shard", "<u8"), ("first_row", "<u8")])


def padded(size: np.ndarray) -> np.ndarray:
    """Returns the bytes that members of `size` bytes take in a tar file, the header of what follows included."""
    return (size.astype(np.int64) + layout.TAR_BLOCK - 1) // layout.TAR_BLOCK * layout.TAR_BLOCK + layout.TAR_BLOCK


class ShardIndex(ABC):
    """What both formats of the index answer.

    Attributes:
        info: dataset.json.
        directory: of the set.
        columns: name -> one number (or row) a sample.
    """

    def __init__(self, info: DatasetInfo, directory: Path, columns: dict[str, np.ndarray]) -> None:
        self.info, self.directory, self.columns = info, directory, columns

    @property
    def labels(self) -> np.ndarray:
        """[n, L] int32, -1 = none."""
        if not self.info.label_width:
            return np.empty((self.info.num_samples, 0), dtype=np.int32)
        return self.columns["labels"]

    def key(self, row: int) -> str:
        """Returns the key of a sample."""
        return bytes(self.columns[KEYS][row]).decode(errors="replace")

    @property
    def first_page(self) -> np.ndarray:
        """[n + 1] int64: where each document's pages begin among all of the set."""
        raise ValueError(f"samples of kind {self.info.kind} have no pages")

    @property
    def page_widths(self) -> np.ndarray:
        """[all pages] int32 pixels."""
        raise ValueError(f"samples of kind {self.info.kind} have no pages")

    @property
    def page_heights(self) -> np.ndarray:
        """[all pages] int32 pixels."""
        raise ValueError(f"samples of kind {self.info.kind} have no pages")

    @abstractmethod
    def page_range(self, row: int) -> range:
        """Returns the pages, places among all of the set, of a document."""

    @abstractmethod
    def shard_of(self, row: int) -> int:
        """Returns the shard, a place among all of the set, that holds a sample."""

    @abstractmethod
    def shard_path(self, shard: int) -> Path:
        """Returns the file of a shard."""

    @abstractmethod
    def shard_end(self, shard: int) -> int:
        """Returns the byte behind the last member's data of a shard."""

    @abstractmethod
    def shard_rows(self) -> Mapping[int, range]:
        """Returns shard -> its samples, of all shards that have some."""

    @abstractmethod
    def place(self, row: int, member: str) -> tuple[int, int]:
        """Returns (offset, size) in bytes of a member's data in its shard."""

    def stored_members(self, row: int) -> list[str]:
        """Returns the names of a sample's members in stored order."""
        names: list[str] = []
        for member in self.info.members:
            if member == layout.PAGES_MEMBER:
                names += map(layout.page_member, range(len(self.page_range(row))))
            else:
                names.append(member)
        return names


class MappedIndex(ShardIndex):
    """Format 2."""

    def __init__(self, info: DatasetInfo, directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
        """
        Args:
            info: dataset.json.
            directory: of the set.
            arrays: files of the index, name -> array; of the shapes that `mistake_in_shapes` checks.
        """
        rows = arrays[ROWS]
        columns = {name: rows[name] for name in rows.dtype.names or ()}
        sizes = (PAGE_COUNT,) if info.has_pages else tuple(SIZE_COLUMNS)
        super().__init__(info, directory, {**columns, **{name: arrays[name] for name in (KEYS, *sizes)}})
        self._arrays = arrays
        self._number = {member: i for i, member in enumerate(info.single_members)}
        self._first_behind_pages = info.members.index(layout.PAGES_MEMBER) if info.has_pages else len(self._number)
        # Some bytes for thousands of samples; as plain arrays, which a search need not convert each time.
        self._shard_firsts = arrays[SHARDS]["first_row"].astype(np.int64)
        self._shard_ends = arrays[SHARDS]["end"].astype(np.int64)
        self._first_page = np.zeros(1, dtype=np.int64)
        if info.has_pages:
            self._first_page = _summed_up(arrays[PAGE_COUNT])

    @property
    def first_page(self) -> np.ndarray:
        return self._first_page

    @property
    def parts(self) -> np.ndarray | None:
        """[k] records of `part_type`; None of a set that is not joined."""
        return self._arrays.get(PARTS)

    @property
    def shard_firsts(self) -> np.ndarray:
        """[shards] int64: the first sample of each."""
        return self._shard_firsts

    @property
    def page_widths(self) -> np.ndarray:
        return self._arrays["page_width"]

    @property
    def page_heights(self) -> np.ndarray:
        return self._arrays["page_height"]

    def page_range(self, row: int) -> range:
        return range(int(self.first_page[row]), int(self.first_page[row + 1]))

    def shard_of(self, row: int) -> int:
        return int(np.searchsorted(self._shard_firsts, row, side="right")) - 1

    def shard_path(self, shard: int) -> Path:
        parts = self._arrays.get(PARTS)
        if parts is None:
            return self.directory / "shards" / layout.shard_name(shard)
        part = parts[int(np.searchsorted(self.first_shards, shard, side="right")) - 1]
        folder = self.directory / bytes(part["path"]).decode("utf-8", "surrogateescape")
        return folder / "shards" / layout.shard_name(shard - int(part["first_shard"]))

    @cached_property
    def first_shards(self) -> np.ndarray:
        """[parts] int64: the first shard of each part."""
        return self._arrays[PARTS]["first_shard"].astype(np.int64)

    def shard_end(self, shard: int) -> int:
        return int(self._shard_ends[shard])

    def shard_rows(self) -> Mapping[int, range]:
        bounds = [*self._shard_firsts.tolist(), self.info.num_samples]
        return {i: range(first, stop) for i, (first, stop) in enumerate(pairwise(bounds))}

    def place(self, row: int, member: str) -> tuple[int, int]:
        record = self._arrays[ROWS][row]
        offset, sizes = int(record["offset"]), np.asarray(record["sizes"])
        number, page = self._number.get(member), layout.page_of_member(member)
        if number is not None:
            before = int(padded(sizes[:number]).sum())
            if number >= self._first_behind_pages:
                before += int(padded(self._page_bytes(row)).sum())
            return offset + before, int(sizes[number])
        pages = self._page_bytes(row) if page is not None and self.info.has_pages else sizes[:0]
        if page is None or page >= len(pages):
            raise KeyError(f"samples of {self.directory} have no member {member}")
        before = int(padded(sizes[: self._first_behind_pages]).sum()) + int(padded(pages[:page]).sum())
        return offset + before, int(pages[page])

    def _page_bytes(self, row: int) -> np.ndarray:
        pages = self.page_range(row)
        return np.asarray(self._arrays[PAGE_BYTES][pages.start : pages.stop])


def _summed_up(counts: np.ndarray) -> np.ndarray:
    """Returns 0 and the sum up to each count, [n + 1] int64; a piece at a time, or numpy would take as much again."""
    sums = np.zeros(len(counts) + 1, dtype=np.int64)
    for start in range(0, len(counts), _CHUNK):
        own = sums[start + 1 : start + 1 + _CHUNK]
        np.cumsum(counts[start : start + _CHUNK], out=own)
        own += sums[start]
    return sums


class ColumnIndex(ShardIndex):
    """Format 1: a file for each column, offsets of all members among them."""

    FILES = ("offsets", "sizes", "shard", "labels", *SIZE_COLUMNS, KEYS)

    def __init__(self, info: DatasetInfo, directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(info, directory, dict(arrays))
        self._number = {member: i for i, member in enumerate(info.members)}

    def page_range(self, row: int) -> range:
        return range(0)

    def shard_of(self, row: int) -> int:
        return int(self.columns["shard"][row])

    def shard_path(self, shard: int) -> Path:
        return self.directory / "shards" / layout.shard_name(shard)

    def shard_end(self, shard: int) -> int:
        last = int(np.searchsorted(self.columns["shard"], shard, side="right")) - 1
        return int(self.columns["offsets"][last, -1]) + int(self.columns["sizes"][last, -1])

    def shard_rows(self) -> Mapping[int, range]:
        shard = self.columns["shard"]
        numbers = np.arange(int(shard[-1]) + 2, dtype=shard.dtype)
        bounds = np.searchsorted(shard, numbers).tolist()
        ranges = enumerate(pairwise(bounds))
        return {number: range(first, stop) for number, (first, stop) in ranges if stop > first}

    def place(self, row: int, member: str) -> tuple[int, int]:
        number = self._number[member]
        return int(self.columns["offsets"][row, number]), int(self.columns["sizes"][row, number])


def load_arrays(info: DatasetInfo, directory: Path) -> dict[str, np.ndarray]:
    """Opens the files of an index, sizes in memory and the rest mapped.

    Raises:
        DataError: one of them is missing or unreadable.
    """
    return {
        name: load_array(
            directory / "index" / f"{name}.npy",
            in_memory=name in (*SIZE_COLUMNS, *PAGE_COLUMNS),
            advice="copy the index again or write the shard set again",
        )
        for name in index_files(info)
    }


def index_files(info: DatasetInfo) -> tuple[str, ...]:
    """Returns the files that the index of such a set has."""
    if info.format_version == 1:
        return ColumnIndex.FILES
    pages = (PAGE_COUNT, *PAGE_COLUMNS, PAGE_BYTES) if info.has_pages else tuple(SIZE_COLUMNS)
    return (ROWS, KEYS, SHARDS, *([PARTS] if info.num_parts else []), *pages)


def index_of(info: DatasetInfo, directory: Path, arrays: Mapping[str, np.ndarray]) -> ShardIndex:
    """Returns the index that arrays of the right shapes make."""
    return (ColumnIndex if info.format_version == 1 else MappedIndex)(info, directory, arrays)
