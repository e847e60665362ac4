"""The shard set on disk: names, constants, `dataset.json`, tar headers. Byte layouts: docs/data_format.md.

A shard set is a folder with tar shards (readable by plain tools, webdataset and DALI) and a memory-mapped index beside
them. Samples have a fixed list of members, so the index is a rectangular table: one row a sample, one column a member.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from megatron_ove.errors import DataError
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary

FORMAT_VERSION = 1
INFO_FILE = "dataset.json"
TAR_BLOCK = 512
"""Bytes of a tar header, and the alignment of member data."""
MOSAIC_COLUMNS = 16
"""Patches in a row of a codec mosaic."""
LABELS_MEMBER = "cls"
MOSAIC_MEMBER = "codec.jpg"
POSITIONS_MEMBER = "positions.npy"
PICTURE_MEMBER = "jpg"

Kind = Literal["image", "ocr", "video"]


def frame_member(frame: int) -> str:
    """Returns the member name of one frame of the clip's temporal grid, e.g. "frame07.jpg"."""
    return f"frame{frame:02d}.jpg"


def member_names(kind: str, frames: int) -> tuple[str, ...]:
    """Returns a sample's members in the order in which they are stored; `frames` counts for clips only."""
    if kind == "video":
        return (MOSAIC_MEMBER, POSITIONS_MEMBER, *map(frame_member, range(frames)), LABELS_MEMBER)
    return (PICTURE_MEMBER, LABELS_MEMBER)


def shard_name(number: int) -> str:
    """Returns the file name of a shard, e.g. "000003.tar"."""
    return f"{number:06d}.tar"


def mosaic_size(num_patches: int, patch_size: int) -> tuple[int, int]:
    """Returns (height, width) in pixels of the mosaic that holds `num_patches` selected patches."""
    return -(-num_patches // MOSAIC_COLUMNS) * patch_size, MOSAIC_COLUMNS * patch_size


def tar_header(name: str, size: int) -> bytes:
    """Returns the 512-byte USTAR header of one file; reproducible (no time, no owner)."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(format=tarfile.USTAR_FORMAT)


def parse_tar_header(block: bytes) -> tuple[str, int]:
    """Returns (name, size) of a tar header.

    Raises:
        tarfile.HeaderError: `block` is no tar header.
    """
    entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    return entry.name, entry.size


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_ENTRY_CHECKS: Mapping[str, Callable[[object], bool]] = {
    "num_samples": _is_count,
    "num_classes": lambda value: _is_count(value) and value != 0,
    "label_width": lambda value: _is_count(value) and value != 0,
    "patch_size": lambda value: _is_count(value) and value != 0,
    "frames": _is_count,
    "grid_height": lambda value: value is None or _is_count(value),
    "grid_width": lambda value: value is None or _is_count(value),
    "members": _is_list_of_names,
}


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json`.

    Attributes:
        kind: what a sample is.
        num_samples: rows of the index.
        num_classes: labels are 0 .. num_classes - 1, or -1 for none.
        label_width: labels of a sample, L.
        members: member names of every sample, in stored order.
        patch_size: side of a patch in pixels; mosaics and frames are made of such patches.
        frames: frames of a clip's temporal grid; 0 for pictures.
        grid_height: patches of a frame from top to bottom; null for pictures.
        grid_width: patches of a frame from left to right; null for pictures.
        created_by: the program that wrote the shard set.
        format_version: version of the layout.
    """

    kind: Kind
    num_samples: int
    num_classes: int
    label_width: int
    members: tuple[str, ...]
    patch_size: int
    frames: int
    grid_height: int | None
    grid_width: int | None
    created_by: str
    format_version: int = FORMAT_VERSION

    @property
    def clip_grid(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of a clip's grid of patches."""
        if self.grid_height is None or self.grid_width is None:
            raise ValueError(f"samples of kind {self.kind} have no clip grid")
        return self.frames, self.grid_height, self.grid_width

    def write(self, directory: Path) -> None:
        """Writes dataset.json into `directory`."""
        (directory / INFO_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> DatasetInfo:
        """Reads and checks dataset.json.

        Raises:
            DataError: no folder, no shard set, or not a readable description.
        """
        path = directory / INFO_FILE
        if not directory.is_dir():
            raise DataError(f"the shard set {directory} does not exist or is no folder; check the source's path")
        if not path.is_file():
            raise DataError(
                f"{directory} is not a shard set, because it holds no {INFO_FILE}; give the folder that a shard writer "
                "made, or build one with the scripts in tools/"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as JSON ({error}); write the shard set again") from error
        return cls._from_json(data, path)

    @classmethod
    def _from_json(cls, data: object, path: Path) -> DatasetInfo:
        version = data.get("format_version") if isinstance(data, dict) else None
        if not isinstance(data, dict) or version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format_version = {version}, but this program reads version {FORMAT_VERSION}; write the "
                "shard set again with this version"
            )
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            odd = sorted(set(data) ^ names)
            raise DataError(f"{path} lacks or has unknown entries ({', '.join(odd)}); write the shard set again")
        wrong = [name for name, accepts in _ENTRY_CHECKS.items() if not accepts(data[name])]
        if wrong:
            raise DataError(
                f"{path} has {wrong[0]} = {data[wrong[0]]!r}, which no shard set has; write the shard set again"
            )
        info = cls(**{**data, "members": tuple(data["members"])})
        if info.kind not in get_args(Kind) or info.members != member_names(info.kind, info.frames):
            raise DataError(
                f"{path} describes kind '{info.kind}' with members {', '.join(info.members[:3])}..., no layout "
                "of this version; write the shard set again"
            )
        return info


def read_vocabulary(directory: Path, info: DatasetInfo) -> Vocabulary | None:
    """Returns the words of a shard set's label ids; None where its folder holds no vocabulary.

    Raises:
        DataError: the file is no vocabulary, or has another number of words than the set has classes.
    """
    path = directory / VOCABULARY_FILE
    if not path.exists():
        return None
    vocabulary = Vocabulary.load(path)
    if len(vocabulary) != info.num_classes:
        raise DataError(
            f"{path} has {len(vocabulary)} words, but {directory} was written with num_classes = {info.num_classes}, "
            "so it is the vocabulary of another set and its ids mean other words; put the one there that the set was "
            "written with"
        )
    return vocabulary
