"""What can be wrong with a shard set when it is opened, each as a sentence.

Every rank compares the shapes of the index with the description. One rank also looks at the shard files: at three of
each part, all of a set that is not divided, and at a few headers; `validation.py` reads everything.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_ove.shards import format as layout
from megatron_ove.shards import index as files
from megatron_ove.shards.files import ShardFiles
from megatron_ove.shards.index import ColumnIndex, MappedIndex, ShardIndex

_MAX_SHARDS_PROBED = 256
"""Shards whose first and last header are read when a set is opened."""
_SHARDS_OF_A_PART = 3
"""Of a part the sizes of so many shards are compared: the first, the last and one between."""
_LOOKING_THREADS = 16
"""A look at a file of a network disk takes a millisecond, of which the processor has nothing."""
_MAX_LABELS_SCANNED = 1 << 24
"""Labels whose range is checked when a set is opened (64 MiB); training checks every row that it uses."""
_FIRST_FORMAT_TYPES = {
    "offsets": ("u", 2),
    "sizes": ("u", 2),
    "shard": ("u", 1),
    "labels": ("i", 2),
    "width": ("i", 1),
    "height": ("i", 1),
    "num_patches": ("i", 1),
    "keys": ("S", 1),
}
"""NumPy kind (unsigned, signed, bytes) and dimensions of each index array of format 1."""
_LAST_BYTE = (1 << 62) - 1
"""What lies behind it is in no file, and the system does not take it for a place in one."""
_CHUNK = 1 << 20
"""Index rows looked at in one go."""

Arrays = Mapping[str, np.ndarray]


def array_problems(info: layout.DatasetInfo, arrays: Arrays, directory: Path) -> list[str]:
    """Returns what is wrong with the files of the index: types, lengths and shapes against dataset.json."""
    for name, array in arrays.items():
        if not _has_type(info, name, array):
            return [
                f"{directory}/index/{name}.npy holds {array.dtype} in {array.ndim} dimensions, which is not what a "
                "shard writer puts there, so the file is damaged or has another array's name; write the shard set again"
            ]
    of_samples = [name for name in arrays if name not in (files.SHARDS, files.PARTS, *_OF_PAGES)]
    lengths = {name: len(arrays[name]) for name in of_samples}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        return [
            f"the index arrays of {directory} have unequal lengths ({listed}), so rows do not belong together; write "
            "the shard set again"
        ]
    count = lengths[of_samples[0]]
    if count != info.num_samples:
        return [
            f"{directory}/{layout.INFO_FILE} promises {info.num_samples} samples, but the index has {count} rows; one "
            "of them is from another version of the shard set: copy both again"
        ]
    if count == 0:
        return [f"{directory} holds no samples, so there is nothing to train on; write samples into it"]
    for name, length in {**dict.fromkeys(_OF_PAGES, info.num_pages), files.PARTS: info.num_parts}.items():
        if name in arrays and len(arrays[name]) != length:
            return [
                f"{directory}/index/{name}.npy has {len(arrays[name])} rows instead of {length}, which "
                f"{layout.INFO_FILE} asks for; write the shard set again"
            ]
    if info.format_version == 1:
        return _first_format_shapes(info, arrays, directory)
    return []


_OF_PAGES = (*files.PAGE_COLUMNS, files.PAGE_BYTES)


def _has_type(info: layout.DatasetInfo, name: str, array: np.ndarray) -> bool:
    if info.format_version == 1:
        kind, dimensions = _FIRST_FORMAT_TYPES[name]
        return array.dtype.kind == kind and array.ndim == dimensions
    if array.ndim != 1:
        return False
    if name == files.KEYS:
        return array.dtype.kind == "S"
    if name == files.PARTS:
        return array.dtype == files.part_type(max(1, array.dtype.itemsize - 16))
    exact = {files.ROWS: info.row_type, files.SHARDS: files.SHARD_TYPE, files.PAGE_BYTES: np.dtype("<u4")}
    return array.dtype == exact.get(name, np.dtype("<i4"))


def _first_format_shapes(info: layout.DatasetInfo, arrays: Arrays, directory: Path) -> list[str]:
    count = info.num_samples
    want = {"offsets": len(info.members), "sizes": len(info.members), "labels": info.label_width}
    for name, width in want.items():
        if arrays[name].shape != (count, width):
            return [
                f"{directory}/index/{name}.npy has shape {list(arrays[name].shape)} instead of [{count}, {width}], "
                f"which {layout.INFO_FILE} asks for; write the shard set again"
            ]
    return []


def index_problems(index: ShardIndex) -> list[str]:
    """Returns what is wrong with what the index says of shards; a glance that every rank can afford."""
    directory = index.directory
    for name in files.PAGE_COLUMNS if index.info.has_pages else ("width", "height"):
        sides = {"page_width": "page_widths", "page_height": "page_heights"}.get(name)
        values = index.columns[name] if sides is None else getattr(index, sides)
        if values.min() < 1:
            return [
                f"{directory}/index/{name}.npy has {int(values.min())} pixels in row {int(values.argmin())}, so it is "
                "damaged; write the shard set again"
            ]
    if isinstance(index, ColumnIndex):
        last = int(index.columns["shard"][-1])
        if last >= index.info.num_samples:
            return [
                f"{directory}/index/shard.npy names shard {last}, more than there are samples, so it is damaged; write "
                "the shard set again"
            ]
        return []
    assert isinstance(index, MappedIndex)
    firsts = index.shard_firsts
    if not len(firsts) or firsts[0] != 0 or (np.diff(firsts) <= 0).any() or firsts[-1] >= index.info.num_samples:
        return [f"{directory}/index/shards.npy is not in order, so it is damaged; write the shard set again"]
    if index.info.has_pages:
        counts, info = index.columns[files.PAGE_COUNT], index.info
        found = (int(counts.min()) >= 1, int(index.first_page[-1]), int(counts.max()))
        if found != (True, info.num_pages, info.most_pages):
            return [
                f"{directory}/index/num_pages.npy counts {found[1]} pages, {found[2]} at most, where "
                f"{layout.INFO_FILE} says {info.num_pages} and {info.most_pages}, or none of a document; one of them "
                "is damaged or of another version of the set: copy both again"
            ]
    return _part_problems(index)


def _part_problems(index: MappedIndex) -> list[str]:
    parts = index.parts
    if parts is None:
        return []
    shards, rows = index.first_shards, parts["first_row"].astype(np.int64)
    is_right = shards[0] == 0 and (np.diff(shards) > 0).all() and 0 <= shards[-1] < len(index.shard_firsts)
    if (
        not is_right
        or (index.shard_firsts[shards] != rows).any()
        or any(b"\0" in path for path in parts["path"].tolist())
    ):
        return [
            f"{index.directory}/index/parts.npy does not belong to the shards of the index, so it is damaged; join the "
            "parts again"
        ]
    return []


def content_problems(index: ShardIndex, shard_files: ShardFiles) -> list[str]:
    """Returns what is wrong between the index and labels and shard files."""
    if isinstance(index, ColumnIndex) and not _is_sorted(index.columns["shard"]):
        return [f"{index.directory}/index/shard.npy is not sorted, so it is damaged; write the shard set again"]
    return label_problems(index, every=False) + _shard_problems(index, shard_files)


def label_problems(index: ShardIndex, *, every: bool) -> list[str]:
    """Returns a sentence when a stored label is out of range; scans a bounded number of rows unless `every`."""
    labels, info = index.labels, index.info
    if not info.label_width:
        return []
    rows = len(labels) if every else min(len(labels), max(1, _MAX_LABELS_SCANNED // info.label_width))
    for start in range(0, rows, _CHUNK):
        chunk = labels[start : min(rows, start + _CHUNK)]
        problem = bad_label(chunk, info.num_classes)
        if problem is not None:
            row, label = problem
            return [label_sentence(label, index.key(start + row), index.directory, info.num_classes)]
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


def _shard_problems(index: ShardIndex, shard_files: ShardFiles) -> list[str]:
    """Returns what is wrong between the index and the shard files: missing, truncated, or other contents."""
    ranges = index.shard_rows()
    numbers = list(ranges)
    probed = set(np.linspace(0, len(numbers) - 1, _MAX_SHARDS_PROBED).astype(int).tolist())
    chosen = _chosen_shards(index, len(numbers))

    def look(places: Sequence[int]) -> list[str]:
        problems: list[str] = []
        for place in places:
            number = numbers[place]
            found = _file_problems(index, shard_files, number)
            if not found and place in probed:
                rows = ranges[number]
                found = header_problems(index, shard_files.peek, number, {rows[0], rows[-1]})
            problems += found
        return problems

    # One task a thread: handing out single shards would take longer than looking at them.
    share = -(-len(chosen) // _LOOKING_THREADS)
    with ThreadPoolExecutor(_LOOKING_THREADS) as pool:
        found = pool.map(look, (chosen[start : start + share] for start in range(0, len(chosen), share)))
        return [problem for problems in found for problem in problems]


def _chosen_shards(index: ShardIndex, count: int) -> list[int]:
    """Returns the shards whose files are looked at."""
    if not index.info.num_parts:
        return list(range(count))
    assert isinstance(index, MappedIndex)
    firsts = index.first_shards
    stops = np.append(firsts[1:], count)
    spread = np.linspace(0, 1, _SHARDS_OF_A_PART)
    places = firsts[:, None] + ((stops - firsts - 1)[:, None] * spread).astype(np.int64)
    return np.unique(places).tolist()


def _file_problems(index: ShardIndex, shard_files: ShardFiles, number: int) -> list[str]:
    path, end = index.shard_path(number), index.shard_end(number)
    try:
        size = shard_files.size(number)
    except (FileNotFoundError, NotADirectoryError):
        return [f"the shard {path} is missing, but the index refers to it; copy it again"]
    except OSError as error:
        return [f"the shard {path} cannot be looked at ({error.strerror or error}); check the disk and its permissions"]
    if size < end:
        return [
            f"the shard {path} is truncated: it has {size} bytes, but its last sample ends at byte {end}; copy or "
            "write it again"
        ]
    return []


def _is_sorted(values: np.ndarray) -> bool:
    """Whether values never fall; a chunk at a time, because an index can be larger than memory."""
    chunks = (values[start : start + _CHUNK + 1] for start in range(0, len(values), _CHUNK))
    return not any((chunk[1:] < chunk[:-1]).any() for chunk in chunks)


def header_problems(
    index: ShardIndex, read: Callable[[int, int, int], bytes], number: int, rows: Iterable[int]
) -> list[str]:
    """Compares tar headers of one shard with the index; returns a sentence for the first that differs.

    `read` returns (shard, bytes, offset) of the shard files.
    """
    path = index.shard_path(number)
    for row in rows:
        key = index.key(row)
        for member in index.stored_members(row):
            offset, size = index.place(row, member)
            want = (f"{key}.{member}", size)
            try:
                block = read(number, layout.TAR_BLOCK, min(max(0, offset - layout.TAR_BLOCK), _LAST_BYTE))
                found = layout.parse_tar_header(block)
            except OSError as error:
                return [
                    f"the shard {path} cannot be read ({error.strerror or error}); check the disk and its permissions"
                ]
            except (tarfile.HeaderError, UnicodeDecodeError):
                found = ("no file header", 0)
            if found != want:
                return [
                    f"the index of {index.directory} does not match its shard {path.name}: it places {want[0]} "
                    f"({want[1]} bytes) at byte {offset}, where the shard has {found[0]} ({found[1]} bytes); index and "
                    "shards are from different runs: copy both again"
                ]
    return []
