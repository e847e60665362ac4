"""The shard set on disk: names, constants, `dataset.json`, tar headers. Byte layouts: docs/data_format.md.

A shard set is a folder with tar shards (readable by plain tools, webdataset and DALI) and an index beside them: one row
a sample, which says where its members lie. A sample has a fixed list of members, and a document pages besides, of which
the index has a row each.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
INFO_FILE = "dataset.json"
TAR_BLOCK = 512
"""Bytes of a tar header, and the alignment of member data."""
MOSAIC_COLUMNS = 16
"""Patches in a row of a codec mosaic."""
LABELS_MEMBER = "cls"
MOSAIC_MEMBER = "codec.jpg"
POSITIONS_MEMBER = "positions.npy"
PICTURE_MEMBER = "jpg"
DOCUMENT_MEMBER = "json"
PAGES_MEMBER = "page*"
"""Stands for all pages of a sample, of which each sample has its own number."""
MAX_PAGES = 10_000
"""Of a sample."""
MAX_FRAMES = 100
"""Of a clip's temporal grid."""
PARTS_FOLDER = "parts"
"""Where the parts lie that tasks have written, before they are joined and after."""

Kind = Literal["image", "ocr", "video", "document"]


def page_member(page: int) -> str:
    """Returns the member name of one page of a document, e.g. "page0007.jpg"."""
    return f"page{page:04d}.jpg"


def page_of_member(member: str) -> int | None:
    """Returns the page that a member is, or None if it is none."""
    number = member.removeprefix("page").removesuffix(".jpg")
    return int(number) if member == f"page{number}.jpg" and number.isdecimal() and number.isascii() else None


def frame_member(frame: int) -> str:
    """Returns the member name of one frame of the clip's temporal grid, e.g. "frame07.jpg"."""
    return f"frame{frame:02d}.jpg"


def member_names(kind: str, frames: int, *, has_labels: bool = True) -> tuple[str, ...]:
    """Returns a sample's members in the order in which they are stored; `frames` counts for clips only.

    `PAGES_MEMBER` stands for all pages of a document. Documents without labels have no labels' member.
    """
    if kind == "video":
        return (MOSAIC_MEMBER, POSITIONS_MEMBER, *map(frame_member, range(frames)), LABELS_MEMBER)
    if kind == "document":
        return (DOCUMENT_MEMBER, PAGES_MEMBER, *([LABELS_MEMBER] if has_labels else []))
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


_MOST = 1 << 48
"""Samples, bytes and whatever else is counted; what is larger is no figure of a set."""
_LONGEST_SIDE = 65535
_MOST_LABELS = 1 << 16


def _is_count(value: object, most: int = _MOST) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_COLUMN_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float32", "float64")
_OWN_COLUMNS = frozenset(
    {"offset", "offsets", "shard", "sizes", "labels", "keys", "width", "height", "num_patches", "num_pages"}
    | {"page_width", "page_height", "page_bytes", "rows", "shards", "parts"}
)
DOCUMENT_COLUMNS = {"characters": "int32", "boxes": "int32", "turns": "int32"}
"""What the index knows of a document's text without reading it: characters, boxes of all units, turns and captions."""


def are_columns(value: object) -> bool:
    """Whether a value can be `DatasetInfo.columns`."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and name.isidentifier() and name not in _OWN_COLUMNS and kind in _COLUMN_TYPES
        for name, kind in value.items()
    )


_ENTRY_CHECKS: Mapping[str, Callable[[object], bool]] = {
    "num_samples": _is_count,
    "num_classes": _is_count,
    "label_width": lambda value: _is_count(value, _MOST_LABELS),
    "patch_size": lambda value: _is_count(value, _LONGEST_SIDE) and value != 0,
    "frames": lambda value: _is_count(value, MAX_FRAMES),
    "grid_height": lambda value: value is None or _is_count(value, _LONGEST_SIDE),
    "grid_width": lambda value: value is None or _is_count(value, _LONGEST_SIDE),
    "members": _is_list_of_names,
    "num_pages": _is_count,
    "most_pages": _is_count,
    "num_parts": _is_count,
    "columns": are_columns,
    "content": lambda value: isinstance(value, str),
}
_SAME = ("kind", "num_classes", "label_width", "members", "patch_size", "frames", "grid_height", "grid_width")
"""What sets must share to be one."""
_SINCE_VERSION_2 = ("num_pages", "most_pages", "num_parts", "columns", "content")


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json`.

    Attributes:
        kind: what a sample is.
        num_samples: rows of the index.
        num_classes: labels are 0 .. num_classes - 1, or -1 for none; 0 for documents without labels.
        label_width: labels of a sample, L; 0 for documents without labels.
        members: member names of every sample, in stored order; `PAGES_MEMBER` stands for as many as a sample has.
        patch_size: side of a patch in pixels; mosaics and frames are made of such patches.
        frames: frames of a clip's temporal grid; 0 for pictures.
        grid_height: patches of a frame from top to bottom; null for pictures.
        grid_width: patches of a frame from left to right; null for pictures.
        created_by: the program that wrote the shard set.
        format_version: version of the layout.
        num_pages: of all documents together; 0 for other kinds.
        most_pages: of one document.
        num_parts: folders that hold the shards; 0 = they lie in this set's own.
        columns: further columns of the index, name -> type of its one number a sample.
        content: digits that differ between sets whose samples differ in anything; "" in format 1.
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
    num_pages: int = 0
    most_pages: int = 0
    num_parts: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    content: str = ""

    @property
    def clip_grid(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of a clip's grid of patches."""
        if self.grid_height is None or self.grid_width is None:
            raise ValueError(f"samples of kind {self.kind} have no clip grid")
        return self.frames, self.grid_height, self.grid_width

    @property
    def single_members(self) -> tuple[str, ...]:
        """Members of which a sample has one, in stored order."""
        return tuple(member for member in self.members if member != PAGES_MEMBER)

    @property
    def has_pages(self) -> bool:
        """Whether samples have pages, each its own number of them."""
        return PAGES_MEMBER in self.members

    @property
    def row_type(self) -> np.dtype[Any]:
        """What the index says of a sample besides its sizes: a record of `index/rows.npy`, without gaps."""
        entries: list[Any] = [("offset", "<u8"), ("sizes", "<u4", (len(self.single_members),))]
        if self.label_width:
            entries.append(("labels", "<i4", (self.label_width,)))
        return np.dtype([*entries, *((name, np.dtype(kind).newbyteorder("<")) for name, kind in self.columns.items())])

    def difference_from(self, first: DatasetInfo) -> tuple[str, Any, Any] | None:
        """Returns the first entry in which two sets cannot be one: its name, here, there; None if they can be one."""
        pairs = ((name, getattr(self, name), getattr(first, name)) for name in _SAME)
        return next(((name, here, there) for name, here, there in pairs if here != there), None)

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
            parts = directory / PARTS_FOLDER
            if parts.is_dir():
                raise DataError(
                    f"{directory} holds parts of a shard set, but no {INFO_FILE}, because they were not joined yet; "
                    f"run python tools/shards/merge_parts.py {directory}"
                )
            raise DataError(
                f"{directory} is not a shard set, because it holds no {INFO_FILE}; give the folder that a shard writer "
                "made, or build one with the scripts in tools/"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} cannot be read as JSON ({error}); write the shard set again") from error
        return cls._from_json(data, path)

    @classmethod
    def _from_json(cls, data: object, path: Path) -> DatasetInfo:
        version = data.get("format_version") if isinstance(data, dict) else None
        if not isinstance(data, dict) or version not in READABLE_VERSIONS:
            raise DataError(
                f"{path} has format_version = {version}, but this program reads versions "
                f"{' and '.join(map(str, READABLE_VERSIONS))}; write the shard set again with this version"
            )
        expected = {field.name for field in fields(cls)} - (set(_SINCE_VERSION_2) if version == 1 else set())
        if set(data) != expected:
            odd = sorted(set(data) ^ expected)
            raise DataError(f"{path} lacks or has unknown entries ({', '.join(odd)}); write the shard set again")
        wrong = [name for name, accepts in _ENTRY_CHECKS.items() if name in data and not accepts(data[name])]
        if data["kind"] != "document":  # which may have none
            wrong += [name for name in ("num_classes", "label_width") if data[name] == 0]
        if data["kind"] == "video":
            wrong += [name for name in ("frames", "grid_height", "grid_width") if not data[name]]
        if wrong:
            raise DataError(
                f"{path} has {wrong[0]} = {data[wrong[0]]!r}, which no shard set has; write the shard set again"
            )
        info = cls(**{**data, "members": tuple(data["members"])})
        members = member_names(info.kind, info.frames, has_labels=info.label_width > 0)
        kinds = get_args(Kind) if version > 1 else get_args(Kind)[:3]
        if info.kind not in kinds or info.members != members:
            raise DataError(
                f"{path} describes kind '{info.kind}' with members {', '.join(info.members[:3])}..., no layout "
                "of this version; write the shard set again"
            )
        return info


def set_mark(directory: Path) -> str:
    """Returns 16 digits that change when a set is written anew with other samples."""
    info = DatasetInfo.read(directory)
    digest = hashlib.sha256((directory / INFO_FILE).read_bytes())
    if not info.content:  # format 1, which has no such digits: its whole index instead
        for path in sorted((directory / "index").glob("*.npy")):
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


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
