"""What can be wrong with a shard set on disk, each as a sentence. Used when one is opened, and in depth by tools.

Opening compares sizes and a few headers (a second for thousands of shards); the deep check reads and decodes all.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_ove.data import shard_format as layout
from megatron_ove.data.picture_check import PictureChecker, UnusablePictureError
from megatron_ove.data.shard_writer import read_positions
from megatron_ove.errors import DataError

if TYPE_CHECKING:
    from megatron_ove.data.shard_index import ShardSet

Columns = Mapping[str, np.ndarray]

_MAX_SHARDS_PROBED = 256
"""Shards whose first and last header are read when a set is opened; the sizes of all shards are compared."""
_MAX_LABELS_SCANNED = 1 << 24
"""Labels whose range is checked when a set is opened (64 MiB); training checks every row that it uses."""
_COLUMN_TYPES = {
    "offsets": ("u", 2),
    "sizes": ("u", 2),
    "shard": ("u", 1),
    "labels": ("i", 2),
    "width": ("i", 1),
    "height": ("i", 1),
    "num_patches": ("i", 1),
    "keys": ("S", 1),
}
"""NumPy kind (unsigned, signed, bytes) and dimensions of each index array."""
_CHUNK = 1 << 20
"""Index rows looked at in one go."""


def index_problems(info: layout.DatasetInfo, columns: Columns, directory: Path) -> list[str]:
    """Returns what is wrong with the index itself: lengths, and shapes against dataset.json."""
    for name, column in columns.items():
        kind, dimensions = _COLUMN_TYPES[name]
        if column.dtype.kind not in kind or column.ndim != dimensions:
            return [
                f"{directory}/index/{name}.npy holds {column.dtype} in {column.ndim} dimensions, which is not what a "
                "shard writer puts there, so the file is damaged or has another array's name; write the shard set again"
            ]
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        return [
            f"the index arrays of {directory} have unequal lengths ({listed}), so rows do not belong together; write "
            "the shard set again"
        ]
    count = lengths["offsets"]
    if count != info.num_samples:
        return [
            f"{directory}/{layout.INFO_FILE} promises {info.num_samples} samples, but the index has {count} rows; one "
            "of them is from another version of the shard set: copy both again"
        ]
    if count == 0:
        return [f"{directory} holds no samples, so there is nothing to train on; write samples into it"]
    want = {"offsets": len(info.members), "sizes": len(info.members), "labels": info.label_width}
    for name, width in want.items():
        if columns[name].shape != (count, width):
            return [
                f"{directory}/index/{name}.npy has shape {list(columns[name].shape)} instead of [{count}, {width}], "
                f"which {layout.INFO_FILE} asks for; write the shard set again"
            ]
    return []


def label_problems(info: layout.DatasetInfo, columns: Columns, directory: Path, *, every: bool) -> list[str]:
    """Returns a sentence when a stored label is out of range; scans a bounded number of rows unless `every`."""
    labels = columns["labels"]
    rows = len(labels) if every else min(len(labels), max(1, _MAX_LABELS_SCANNED // info.label_width))
    for start in range(0, rows, _CHUNK):
        chunk = labels[start : min(rows, start + _CHUNK)]
        problem = bad_label(chunk, info.num_classes)
        if problem is not None:
            row, label = problem
            key = bytes(columns["keys"][start + row]).decode()
            return [label_sentence(label, key, directory, info.num_classes)]
    return []


def bad_label(labels: np.ndarray, num_classes: int) -> tuple[int, int] | None:
    """Returns (row, label) of the first label outside -1 .. num_classes - 1, or None.

    Args:
        labels: [n, L] int32.
        num_classes: upper limit, exclusive.
    """
    bad = (labels < -1) | (labels >= num_classes)
    if not bad.any():
        return None
    row, column = np.argwhere(bad)[0]
    return int(row), int(labels[row, column])


def label_sentence(label: int, key: str, directory: Path, num_classes: int) -> str:
    """Returns the message for a stored label that is out of range."""
    return (
        f"label {label} of sample '{key}' in {directory} is outside 0..{num_classes - 1} (num_classes = {num_classes}; "
        "-1 = none), so the index is damaged or the shard set was made for another label set; write it again"
    )


def shard_problems(info: layout.DatasetInfo, columns: Columns, directory: Path) -> list[str]:
    """Returns what is wrong between the index and the shard files: missing, truncated, or other contents."""
    shard = columns["shard"]
    if not _is_sorted(shard):
        return [f"{directory}/index/shard.npy is not sorted, so it is damaged; write the shard set again"]
    if int(shard[-1]) >= len(shard):
        return [
            f"{directory}/index/shard.npy names shard {int(shard[-1])}, more than there are samples, so it is damaged; "
            "write the shard set again"
        ]
    ranges = shard_ranges(shard)
    probes = set(np.linspace(0, len(ranges) - 1, _MAX_SHARDS_PROBED).astype(int).tolist())
    problems = []
    for i, (number, rows) in enumerate(ranges):
        path = directory / "shards" / layout.shard_name(number)
        if not path.is_file():
            problems.append(f"the shard {path} is missing, but the index refers to it; copy it again")
            continue
        end = int(columns["offsets"][rows[-1], -1]) + int(columns["sizes"][rows[-1], -1])
        size = path.stat().st_size
        if size < end:
            problems.append(
                f"the shard {path} is truncated: it has {size} bytes, but its last sample ends at byte {end}; copy or "
                "write it again"
            )
        elif i in probes:
            problems += header_problems(info, columns, path, {rows[0], rows[-1]})
    return problems


def shard_ranges(shard: np.ndarray) -> list[tuple[int, range]]:
    """Returns (shard number, its rows) for every shard; `shard` is [n] and sorted. Reads little of it."""
    numbers = np.arange(int(shard[-1]) + 2, dtype=shard.dtype)
    bounds = np.searchsorted(shard, numbers).tolist()
    ranges = [(number, range(start, stop)) for number, (start, stop) in enumerate(pairwise(bounds))]
    return [(number, rows) for number, rows in ranges if rows]


def _is_sorted(values: np.ndarray) -> bool:
    """Whether values never fall; a chunk at a time, because an index can be larger than memory."""
    chunks = (values[start : start + _CHUNK + 1] for start in range(0, len(values), _CHUNK))
    return not any((chunk[1:] < chunk[:-1]).any() for chunk in chunks)


def header_problems(info: layout.DatasetInfo, columns: Columns, path: Path, rows: Iterable[int]) -> list[str]:
    """Compares tar headers of one shard with the index; returns a sentence for the first that differs."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        return [f"the shard {path} cannot be opened ({error.strerror}); check its permissions"]
    try:
        for row in rows:
            key = bytes(columns["keys"][row]).decode(errors="replace")
            for column, member in enumerate(info.members):
                offset, size = int(columns["offsets"][row, column]), int(columns["sizes"][row, column])
                want = (f"{key}.{member}", size)
                block = os.pread(handle, layout.TAR_BLOCK, max(0, offset - layout.TAR_BLOCK))
                try:
                    found = layout.parse_tar_header(block)
                except (tarfile.HeaderError, UnicodeDecodeError):
                    found = ("no file header", 0)
                if found != want:
                    return [
                        f"the index of {path.parent.parent} does not match its shard {path.name}: it places "
                        f"{want[0]} ({want[1]} bytes) at byte {offset}, where the shard has {found[0]} ({found[1]} "
                        "bytes); index and shards are from different runs: copy both again"
                    ]
    finally:
        os.close(handle)
    return []


def vocabulary_problems(shards: ShardSet) -> list[str]:
    """Returns what is wrong with the vocabulary beside the shards; nothing where there is none."""
    try:
        shards.read_vocabulary()
    except DataError as error:
        return [str(error)]
    return []


def deep_problems(shards: ShardSet) -> list[str]:
    """Returns what is wrong after every header was compared, every picture decoded and every label read."""
    info, columns = shards.info, shards.columns
    problems = label_problems(info, columns, shards.directory, every=True)
    for number, rows in shard_ranges(columns["shard"]):
        problems += header_problems(info, columns, shards.shard_path(number), rows)
    if problems:
        return problems
    checker = PictureChecker()
    for i in range(len(shards)):
        problems += _sample_problems(shards, i, checker)
    return problems


def _sample_problems(shards: ShardSet, i: int, checker: PictureChecker) -> list[str]:
    info, name = shards.info, shards.describe(i)
    pictures = [member for member in info.members if member.endswith("jpg")]
    try:
        sizes = checker.measure([shards.read(i, member) for member in pictures])
        positions = read_positions(shards.read(i, layout.POSITIONS_MEMBER), info) if info.kind == "video" else None
    except UnusablePictureError as error:
        return [f"{pictures[error.index]} of {name} is unusable: {error}; write the shard set again"]
    except DataError as error:
        return [f"{name} is unusable: {error}; write the shard set again"]
    stored = np.frombuffer(shards.read(i, layout.LABELS_MEMBER), "<i4")
    if not np.array_equal(stored, shards.labels[i]):
        return [f"the labels of {name} differ between shard and index; write the shard set again"]
    size = (int(shards.height[i]), int(shards.width[i]))
    if sizes[-1] != size:
        return [f"{name} has {sizes[-1][1]} x {sizes[-1][0]} pixels, but the index says {size[1]} x {size[0]}"]
    if positions is not None and len(positions) != shards.num_patches[i]:
        return [f"{name} has {len(positions)} selected patches, but the index says {shards.num_patches[i]}"]
    return []
