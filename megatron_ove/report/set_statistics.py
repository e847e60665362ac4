"""What a shard set holds in numbers, from its index alone: no sample is read.

Of a large set at most about a million rows of the index are looked at, in runs of neighbours that lie evenly over the
set: single rows of an index that is mapped from a network disk would each cost a read of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ove.shards.shard_set import ShardSet

MAX_ROWS = 1 << 20
"""Rows of the index, and rows of its pages, that are looked at."""
MOST_COMMON = 20
"""Classes that are listed."""
_LABELS_AT_ONCE = 1 << 22
_BARS = 24
_COLUMN_NAMES = {"characters": "characters of text", "boxes": "boxes", "turns": "turns and captions"}
_EXACT = float(1 << 53)


@dataclass(frozen=True)
class Bar:
    """`count` values lie between `low` and `high`; both belong to it where values are whole numbers."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Distribution:
    """Some numbers, e.g. the patches of each sample.

    Attributes:
        name: what they count.
        minimum: the least of them.
        median: half of them are below.
        mean: their mean.
        maximum: the greatest.
        bars: a histogram, from the least to the greatest.
        is_open: whether the last bar also counts all that is greater than it says.
        is_whole: whether they are whole numbers.
    """

    name: str
    minimum: float
    median: float
    mean: float
    maximum: float
    bars: tuple[Bar, ...]
    is_open: bool
    is_whole: bool

    @classmethod
    def of(cls, name: str, values: np.ndarray) -> Distribution | None:
        """Returns the distribution of values of any number type; None if none of them is finite."""
        finite = values[np.isfinite(values)]
        if not len(finite):
            return None
        numbers = finite.astype(np.float64)
        is_whole = finite.dtype.kind in "iu" and float(np.abs(numbers).max()) < _EXACT
        low, high, edge = float(numbers.min()), float(numbers.max()), float(np.quantile(numbers, 0.99))
        # A single giant would push all others into the first bar.
        is_open = low < edge and high - low > 2 * (edge - low)
        bars = _bars(numbers, low, edge if is_open else high, is_whole=is_whole)
        middle, mean = float(np.median(numbers)), float(numbers.mean())
        return cls(name, low, middle, mean, high, bars, is_open, is_whole)


def _bars(numbers: np.ndarray, low: float, top: float, *, is_whole: bool) -> tuple[Bar, ...]:
    if not math.isfinite(top - low):
        return ()
    if is_whole:
        width = math.ceil((top - low + 1) / _BARS)
        edges = low + width * np.arange(math.ceil((top - low + 1) / width) + 1, dtype=np.float64)
    else:
        edges = np.linspace(low, top, _BARS + 1) if top > low else np.array([low, low])
    places = np.searchsorted(edges, numbers, side="right") - 1
    counts = np.bincount(np.clip(places, 0, len(edges) - 2), minlength=len(edges) - 1)
    # The last bar of whole numbers may be wider than there is need for.
    highs = np.minimum(edges[1:] - 1, np.ceil(top)) if is_whole else edges[1:]
    return tuple(map(Bar, edges[:-1].tolist(), highs.tolist(), counts.tolist()))


@dataclass(frozen=True)
class LabelCounts:
    """Labels of the rows that were looked at.

    Attributes:
        per_sample: how many labels samples have.
        num_without: samples without any.
        num_labels: labels together.
        num_classes: different classes among them.
        most_common: (class, its labels), most first; classes as often are in the order of their numbers.
    """

    per_sample: Distribution
    num_without: int
    num_labels: int
    num_classes: int
    most_common: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SetStatistics:
    """A shard set in numbers.

    Attributes:
        num_samples: rows of the index.
        num_pages: pages of all documents; 0 for other kinds.
        num_shards: tar files.
        num_parts: folders that hold them; 0 = the set's own.
        shard_bytes: bytes of all shards up to the end of their last members.
        num_rows: rows that were looked at for what follows.
        num_runs: runs of neighbours in which they lie.
        num_page_rows: pages that were looked at for their sizes.
        sizes: width and height in pixels (of pages, of documents), and patches and pages of a sample.
        columns: what else the index keeps of a sample.
        labels: None of documents without labels.
        num_without_text: documents whose text is empty; None where the index does not say.
    """

    num_samples: int
    num_pages: int
    num_shards: int
    num_parts: int
    shard_bytes: int
    num_rows: int
    num_runs: int
    num_page_rows: int
    sizes: tuple[Distribution, ...]
    columns: tuple[Distribution, ...]
    labels: LabelCounts | None
    num_without_text: int | None

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """All of them."""
        return (*self.sizes, *self.columns, *([self.labels.per_sample] if self.labels else []))

    @property
    def basis(self) -> str:
        """A sentence: which rows were looked at."""
        if self.num_rows == self.num_samples:
            return "From the index, all rows."
        return (
            f"From {self.num_rows:,} of the {self.num_samples:,} rows of the index, in {self.num_runs:,} runs of "
            "neighbours evenly over the set; shares, counts and extremes are theirs."
        )


def measure_shard_set(shards: ShardSet, *, max_rows: int = MAX_ROWS) -> SetStatistics:
    """Looks at the index of a shard set.

    Args:
        shards: the set.
        max_rows: rows, and pages, at most.
    """
    index, info = shards.index, shards.info
    runs = even_runs(len(shards), max_rows)
    page_runs = even_runs(info.num_pages, max_rows) if info.has_pages else []
    columns = {name: _column(shards.columns[name], runs) for name in info.columns if name in shards.columns}
    named = [Distribution.of(_COLUMN_NAMES.get(name, name), values) for name, values in columns.items()]
    is_text_known = info.kind == "document" and "characters" in columns
    return SetStatistics(
        num_samples=len(shards),
        num_pages=info.num_pages,
        num_shards=len(index.shard_rows()),
        num_parts=info.num_parts,
        shard_bytes=sum(index.shard_end(shard) for shard in index.shard_rows()),
        num_rows=sum(map(len, runs)),
        num_runs=len(runs),
        num_page_rows=sum(map(len, page_runs)),
        sizes=_sizes(shards, runs, page_runs),
        columns=tuple(one for one in named if one),
        labels=_count_labels(shards.labels, runs) if info.label_width else None,
        num_without_text=int((columns["characters"] == 0).sum()) if is_text_known else None,
    )


def even_runs(count: int, most: int) -> list[range]:
    """Divides rows into runs of neighbours, and leaves out runs at equal distances if there are more rows than `most`.

    Args:
        count: rows.
        most: rows that may be taken, at least 1; the runs are as long as there are many.

    Returns:
        Ascending, without overlap. All rows if there are at most `most`; else the first and the last are among them.
    """
    length = max(1, math.isqrt(most))
    if count <= most:
        return [range(first, min(first + length, count)) for first in range(0, count, length)]
    number = most // length
    firsts = [i * (count - length) // max(1, number - 1) for i in range(number)]
    return [range(first, first + length) for first in firsts]


def _column(column: np.ndarray, runs: Sequence[range]) -> np.ndarray:
    parts = [np.asarray(column[run.start : run.stop]) for run in runs]
    return np.concatenate(parts) if parts else np.empty(0, column.dtype)


def _sizes(shards: ShardSet, runs: Sequence[range], page_runs: Sequence[range]) -> tuple[Distribution, ...]:
    info, index = shards.info, shards.index
    if info.has_pages:
        widths, heights = _column(index.page_widths, page_runs), _column(index.page_heights, page_runs)
        values = {
            "width of a page, pixels": widths,
            "height of a page, pixels": heights,
            "pages of a sample": _column(shards.num_pages, runs),
            "patches of a sample": np.concatenate([_page_patches(shards, run) for run in runs]),
        }
    else:
        of = " of a frame" if info.kind == "video" else ""
        values = {
            f"width{of}, pixels": _column(shards.width, runs),
            f"height{of}, pixels": _column(shards.height, runs),
            "patches of a sample": _column(shards.num_patches, runs),
        }
    found = [Distribution.of(name, numbers) for name, numbers in values.items()]
    return tuple(one for one in found if one)


def _page_patches(shards: ShardSet, run: range) -> np.ndarray:
    """Returns [len(run)] int64: patches that cover all pages of each document; `num_patches` would ask all of them."""
    counts, sizes = shards.page_sizes(np.arange(run.start, run.stop))
    return np.add.reduceat((-(-sizes // shards.info.patch_size)).prod(axis=1), np.cumsum(counts) - counts)


def _count_labels(labels: np.ndarray, runs: Sequence[range]) -> LabelCounts:
    per_sample = np.concatenate([(labels[run.start : run.stop] >= 0).sum(axis=1) for run in runs])
    classes, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for chunk in _chunks(labels, runs):
        found, number = np.unique(chunk[chunk >= 0], return_counts=True)
        classes, places = np.unique(np.concatenate([classes, found]), return_inverse=True)
        weights = np.concatenate([counts, number])
        counts = np.zeros(len(classes), np.int64)
        np.add.at(counts, places, weights)
    order = np.lexsort((classes, -counts))[:MOST_COMMON]
    distribution = Distribution.of("labels of a sample", per_sample)
    assert distribution is not None  # a set that can be opened has samples
    return LabelCounts(
        distribution,
        int((per_sample == 0).sum()),
        int(per_sample.sum()),
        len(classes),
        tuple(zip(classes[order].tolist(), counts[order].tolist(), strict=True)),
    )


def _chunks(labels: np.ndarray, runs: Sequence[range]) -> Iterator[np.ndarray]:
    """Yields [some, L] labels of all rows of `runs`, few enough to be sorted at once, and not one run at a time."""
    waiting: list[np.ndarray] = []
    for run in runs:
        waiting.append(np.asarray(labels[run.start : run.stop]))
        if sum(part.size for part in waiting) >= _LABELS_AT_ONCE:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)
