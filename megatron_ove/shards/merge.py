"""Joins parts of a shard set, which tasks have written independently, into one index; no tar file is touched.

A part is a shard set by itself. Its rows are appended to those of the parts before it as they are, so the joined set
has the samples that one writer of everything would have written, in the same order. Nothing is held in memory that
grows with the number of samples but a piece of one column.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.new_folder import new_folder
from megatron_ove.shards import format as layout
from megatron_ove.shards import index as files
from megatron_ove.shards.format import INFO_FILE, PARTS_FOLDER, DatasetInfo, set_mark
from megatron_ove.shards.index import load_arrays
from megatron_ove.shards.old_index import rows_of_format_1
from megatron_ove.shards.opening import array_problems, index_problems
from megatron_ove.vocabulary import VOCABULARY_FILE

PART_FILE = "part.json"
"""Beside a part: which task of how many wrote it, and with which settings."""
_SHARED_COMPANIONS = ("codec_settings.json", VOCABULARY_FILE)
"""Files that all parts must share, and the joined set gets."""
_PART_NAME = re.compile(r"(\d+)-of-(\d+)")
_CHUNK = 1 << 18
"""Rows copied or hashed in one go."""
_KEYS_IN_MEMORY = 1 << 24
"""Keys compared in one go: 128 MiB of hashes."""


def part_name(number: int, count: int) -> str:
    """Returns the folder of the part that task `number` (from 0) of `count` writes, e.g. "00003-of-00016"."""
    return f"{number:05d}-of-{count:05d}"


@dataclass(frozen=True)
class _Part:
    """A part that was opened.

    Attributes:
        path: its folder.
        info: its dataset.json.
        num_shards: its tar files.
        key_bytes: of its longest key.
    """

    path: Path
    info: DatasetInfo
    num_shards: int = 0
    key_bytes: int = 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the files of its index in the present format; of format 1 they are made from its columns."""
        arrays = load_arrays(self.info, self.path)
        return rows_of_format_1(self.info, arrays, self.path) if self.info.format_version == 1 else arrays


Progress = Callable[[Sequence[Path]], Iterator[Path]]


def merge_parts(directory: str | Path, parts: Sequence[str | Path] = (), *, progress: Progress = iter) -> DatasetInfo:
    """Joins parts into the shard set `directory`.

    Args:
        directory: of the joined set. With `parts` it must not exist or be empty.
        parts: folders of the parts in their order, anywhere; they stay where they are and must not move, except
            together with the joined set. () = all folders below `directory`/parts; the index is written beside them.
        progress: shows how far the parts are; called with their folders.

    Returns:
        The description of the joined set.

    Raises:
        DataError: a part is missing, damaged, or does not fit the others, a key is in two of them, or the set cannot be
            written; every part that is wrong, one sentence a line.
    """
    target = Path(directory)
    own = not parts
    folders = _own_parts(target) if own else [Path(part) for part in parts]
    opened = _open(folders, progress)
    info = _common_info(opened)
    if own:
        # The description goes first and comes last: without it nobody opens an index that does not belong to it.
        (target / INFO_FILE).unlink(missing_ok=True)
        with new_folder(target / "index", replace_if=_is_index) as folder:
            _write_index(opened, info, folder, target)
        _add_companions(opened, target)
        _replace_info(info, target)
    else:
        with new_folder(target) as folder:
            (folder / "index").mkdir()
            _write_index(opened, info, folder / "index", target)
            _add_companions(opened, folder)
            info.write(folder)
    return info


def _own_parts(directory: Path) -> list[Path]:
    """Returns the folders below `parts`; all of one division and none missing, where their names say one.

    Raises:
        DataError: there are none, or one of the division is not there.
    """
    folder = directory / PARTS_FOLDER
    if (directory / "shards").exists():
        raise DataError(
            f"{directory} is a whole shard set itself, which a set joined of its {PARTS_FOLDER} would replace; let "
            "tasks write into another folder"
        )
    if not folder.is_dir():
        raise DataError(
            f"{directory} holds no folder {PARTS_FOLDER}, so there is nothing to join; give the folder that tasks have "
            "written parts into, or name the parts"
        )
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    numbers = {path: _PART_NAME.fullmatch(path.name) for path in found}
    counts = sorted({int(match[2]) for match in numbers.values() if match})
    if not found:
        raise DataError(f"{folder} is empty, so there is nothing to join; let its tasks run first")
    if len(counts) > 1:
        raise DataError(
            f"{folder} holds parts of {counts[0]} and of {counts[1]} tasks, whose samples overlap; remove those of one "
            "division"
        )
    if counts:
        there = {int(match[1]) for match in numbers.values() if match}
        missing = next((number for number in range(counts[0]) if number not in there), None)
        if missing is not None:
            raise DataError(
                f"{folder} lacks {counts[0] - len(there)} of {counts[0]} parts, the first is "
                f"{part_name(missing, counts[0])}; run its task (--task {missing + 1}/{counts[0]}), then join again"
            )
        odd = next((path for path, match in numbers.items() if match is None), None)
        if odd is not None:
            raise DataError(f"{odd} is none of the {counts[0]} parts beside it; move it away, then join again")
    return found


def _open(folders: Sequence[Path], progress: Progress) -> list[_Part]:
    problems: list[str] = []
    opened: list[_Part] = []
    seen: dict[Path, Path] = {}
    for folder in progress(folders):
        try:
            first = seen.setdefault(folder.resolve(), folder)
            if first is not folder:
                raise DataError(f"{folder} is named twice; name each part once")
            info = DatasetInfo.read(folder)
            if info.num_parts:
                raise DataError(f"{folder} is a joined set itself; name its parts instead")
            opened.append(_open_part(folder, info) if info.num_samples else _Part(folder, info))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return opened


def _open_part(folder: Path, info: DatasetInfo) -> _Part:
    """Looks at the index of a part that has samples.

    Raises:
        DataError: it is damaged.
    """
    arrays = load_arrays(info, folder)
    wrong = array_problems(info, arrays, folder)
    if not wrong:
        index = files.index_of(info, folder, arrays)
        wrong = index_problems(index)
    if wrong:
        raise DataError("\n".join(wrong))
    return _Part(folder, info, len(index.shard_rows()), arrays[files.KEYS].dtype.itemsize)


def _common_info(parts: Sequence[_Part]) -> DatasetInfo:
    """Returns the description of all parts together.

    Raises:
        DataError: two of them cannot be one set, or none has a sample.
    """
    first = parts[0]
    problems = []
    for part in parts[1:]:
        difference = part.info.difference_from(first.info)
        if difference is None and list(part.info.columns.items()) != list(first.info.columns.items()):
            difference = ("columns", part.info.columns, first.info.columns)  # records are joined as they are
        if difference:
            name, here, there = difference
            problems.append(f"{part.path} has {name} = {here}, but {first.path} has {there}, so they are no one set")
    problems += [*_companion_problems(parts), *_settings_problems(parts)]
    if problems:
        raise DataError("\n".join(f"{problem}; write the parts alike" for problem in problems))
    count = sum(part.info.num_samples for part in parts)
    if not count:
        raise DataError(f"none of {len(parts)} parts has a sample, so there is nothing to train on; see their rejects")
    return DatasetInfo(
        **{
            **vars(first.info),
            "num_samples": count,
            "num_pages": sum(part.info.num_pages for part in parts),
            "most_pages": max(part.info.most_pages for part in parts),
            "num_parts": sum(part.info.num_samples > 0 for part in parts),
            "format_version": layout.FORMAT_VERSION,
            "content": _content_of(parts),
        }
    )


def _content_of(parts: Sequence[_Part]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part.info.content or set_mark(part.path)).encode() + b"\n")
    return digest.hexdigest()[:32]


def _companion_problems(parts: Sequence[_Part]) -> Iterator[str]:
    for name in _SHARED_COMPANIONS:
        first = _content(parts[0].path / name)
        for part in parts[1:]:
            if _content(part.path / name) != first:
                yield f"{name} of {part.path} differs from that of {parts[0].path}, so their labels differ in meaning"
                break


def _settings_problems(parts: Sequence[_Part]) -> Iterator[str]:
    first = read_part_settings(parts[0].path)
    for part in parts[1:]:
        here = read_part_settings(part.path)
        if here != first:
            one, other = first or {}, here or {}
            odd = sorted(name for name in {**one, **other} if one.get(name) != other.get(name))
            yield (
                f"{part.path} was written with another {odd[0]} than {parts[0].path} (see their {PART_FILE}), so "
                "samples may be missing or double"
            )
            return


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _add_companions(parts: Sequence[_Part], folder: Path) -> None:
    for name in _SHARED_COMPANIONS:
        if not (parts[0].path / name).is_file():
            (folder / name).unlink(missing_ok=True)
            continue
        partial = folder / f".{name}.joining"
        shutil.copyfile(parts[0].path / name, partial)
        partial.replace(folder / name)  # training may read it


def _write_index(parts: Sequence[_Part], info: DatasetInfo, folder: Path, target: Path) -> None:
    filled = [part for part in parts if part.info.num_samples]
    paths = [os.fsencode(os.path.relpath(part.path.resolve(), target.resolve())) for part in filled]
    key_type = np.dtype(f"S{max(part.key_bytes for part in filled)}")
    types = {files.ROWS: info.row_type, files.KEYS: key_type, files.SHARDS: files.SHARD_TYPE}
    types |= {name: np.dtype("<u4" if name == files.PAGE_BYTES else "<i4") for name in files.index_files(info)[4:]}
    lengths = {name: info.num_pages if "page_" in name else info.num_samples for name in types}
    lengths[files.SHARDS] = sum(part.num_shards for part in filled)
    outputs = {name: _Column(folder / f"{name}.npy", types[name], lengths[name]) for name in types}
    table = np.zeros(len(filled), dtype=files.part_type(max(map(len, paths))))
    first_row = first_shard = 0
    for number, part in enumerate(filled):
        arrays = part.arrays()
        table[number] = (paths[number], first_shard, first_row)
        for name, output in outputs.items():
            for start in range(0, len(arrays[name]), _CHUNK):
                piece = arrays[name][start : start + _CHUNK].astype(types[name])
                if name == files.SHARDS:
                    piece["first_row"] += np.uint64(first_row)
                output.append(piece)
        first_row += part.info.num_samples
        first_shard += part.num_shards
    for output in outputs.values():
        output.close()
    np.save(folder / f"{files.PARTS}.npy", table)
    problem = _double_key(folder / f"{files.KEYS}.npy", table, [part.path for part in filled])
    if problem:
        raise DataError(problem)


class _Column:
    """An .npy file written from its beginning to its end, by pieces."""

    def __init__(self, path: Path, dtype: np.dtype, length: int) -> None:
        self._stream = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._stream, header)

    def append(self, piece: np.ndarray) -> None:
        self._stream.write(piece.tobytes())

    def close(self) -> None:
        self._stream.close()


def _double_key(path: Path, table: np.ndarray, folders: Sequence[Path]) -> str | None:
    """Returns a sentence about a key that two samples have; compares hashes, some of them at a time."""
    keys = np.load(path, mmap_mode="r")
    num_rounds = -(-len(keys) // _KEYS_IN_MEMORY)
    for round_number in range(num_rounds):
        hashes, rows = [], []
        for start in range(0, len(keys), _CHUNK):
            found = _hashes(keys[start : start + _CHUNK])
            mine = np.flatnonzero(found % np.uint64(num_rounds) == round_number)
            hashes.append(found[mine])
            rows.append(mine + start)
        all_hashes, all_rows = np.concatenate(hashes), np.concatenate(rows)
        order = np.argsort(all_hashes, kind="stable")
        same = np.flatnonzero(all_hashes[order][1:] == all_hashes[order][:-1])
        for place in same.tolist():
            one, other = int(all_rows[order[place]]), int(all_rows[order[place + 1]])
            if keys[one] == keys[other]:
                first_rows = table["first_row"].astype(np.int64)
                where = [folders[int(np.searchsorted(first_rows, row, side="right")) - 1] for row in (one, other)]
                return (
                    f"key '{bytes(keys[one]).decode()}' is in {where[0]} and again in {where[1]}, and keys tell "
                    "samples apart: the parts overlap, or were named alike; write one of them again"
                )
    return None


def _hashes(keys: np.ndarray) -> np.ndarray:
    """Returns [n] uint64, equal for equal keys."""
    size = -(-keys.dtype.itemsize // 8) * 8
    words = keys.astype(f"S{size}").view(np.uint64).reshape(len(keys), -1)
    found = np.full(len(keys), np.uint64(0x9E3779B97F4A7C15))
    for word in words.T:
        found = (found ^ word) * np.uint64(0xFF51AFD7ED558CCD)
        found ^= found >> np.uint64(33)
    return found


def _is_index(folder: Path) -> bool:
    return all(path.suffix == ".npy" and path.stem in files.INDEX_FILES for path in folder.iterdir())


def _replace_info(info: DatasetInfo, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory, prefix=".joining-") as folder:
        info.write(Path(folder))
        (Path(folder) / INFO_FILE).replace(directory / INFO_FILE)


def read_part_settings(folder: Path) -> dict[str, object] | None:
    """Returns what the tool that wrote a part or a set says of how it did; None if it says nothing."""
    try:
        found = json.loads((folder / PART_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
