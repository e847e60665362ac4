"""`ShardWriter`: tar shards and their index, written together; a bad picture or label never gets in.

Everything goes to a temporary folder beside the target, which is renamed when complete (see `new_folder`): a shard set
that can be seen is whole. One process writes one set; many write a large one in parts, which `merge.py` joins.
"""

from __future__ import annotations

import hashlib
import logging
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.new_folder import NewFolder
from megatron_ove.rejects import RejectsFile
from megatron_ove.sample_keys import MAX_KEY_LENGTH, is_valid_key
from megatron_ove.shards import format as layout
from megatron_ove.shards import index
from megatron_ove.shards.samples import Measures, SampleChecker, UnusableSampleError

_log = logging.getLogger(__name__)

PARTS = ("shards", "index")
"""Folders of every set."""
_TOKENS = re.compile(r"tokens-[0-9a-f]{16}")
_IN_TOKENS = re.compile(r"(\w+\.npy|cache\.json)")
COMPANIONS = ("codec_settings.json", "vocabulary.json", "part.json")
"""Files that may lie beside a shard set's own."""
_ALL_FILES = dict.fromkeys((*index.INDEX_FILES, *index.ColumnIndex.FILES))
_IN_PARTS = re.compile(rf"shards/\d{{6,}}\.tar(\.idx)?|index/({'|'.join(_ALL_FILES)})\.npy")


class ShardWriter:
    """Writes one shard set; use as a context manager. An error inside the block leaves nothing behind."""

    def __init__(
        self,
        directory: str | Path,
        *,
        kind: layout.Kind,
        num_classes: int = 0,
        label_width: int = 0,
        columns: Mapping[str, str] | None = None,
        rejects: RejectsFile | None = None,
        samples_per_shard: int = 4096,
        patch_size: int = 14,
        frames: int = 64,
        grid_height: int | None = None,
        grid_width: int | None = None,
        overwrite: bool = False,
        may_be_empty: bool = False,
    ) -> None:
        """Starts a shard set.

        Args:
            directory: target folder; must not exist or be empty, but see `overwrite`.
            kind: image, ocr, video or document.
            num_classes: label ids are 0 .. num_classes - 1; -1 = none. Documents need no labels: 0, and no label_width.
            label_width: labels per sample.
            columns: what else the index keeps of each sample, name -> type of the number; see `add`.
            rejects: where refused samples are recorded; without it they are logged.
            samples_per_shard: samples per tar file.
            patch_size: side of a patch in pixels.
            frames: frames of a clip's temporal grid (video only).
            grid_height: patches of a frame from top to bottom (video only).
            grid_width: patches of a frame from left to right (video only).
            overwrite: whether an earlier shard set may be replaced, once the new one is whole; never another folder.
            may_be_empty: whether a set without samples is written, as a part of a larger one may have to be.

        Raises:
            DataError: the folder exists, or a value makes no shard set.
        """
        self.directory = Path(directory)
        if samples_per_shard < 1:
            raise DataError(
                f"samples_per_shard = {samples_per_shard} must be at least 1; correct it for {self.directory}"
            )
        is_video = kind == "video"
        self._info = layout.DatasetInfo(
            kind=kind,
            num_samples=0,
            num_classes=num_classes,
            label_width=label_width,
            members=layout.member_names(kind, frames, has_labels=label_width > 0),
            patch_size=patch_size,
            frames=frames if is_video else 0,
            grid_height=grid_height if is_video else None,
            grid_width=grid_width if is_video else None,
            created_by="megatron_ove",
            columns={**(layout.DOCUMENT_COLUMNS if kind == "document" else {}), **(columns or {})},
        )
        _check_settings(self._info, self.directory)
        self._rejects = rejects
        self._samples_per_shard = samples_per_shard
        self._may_be_empty = may_be_empty
        self._checker = SampleChecker(self._info)
        self._keys: dict[str, None] = {}
        self._rows = bytearray()  # records of `DatasetInfo.row_type`
        names = (index.PAGE_COUNT, *index.PAGE_COLUMNS, index.PAGE_BYTES, *index.SIZE_COLUMNS)
        self._sizes = {name: array("I" if name == index.PAGE_BYTES else "i") for name in names}
        self._shards: list[tuple[int, int]] = []  # first row and end of each
        self._shard: _OpenShard | None = None
        self._first_reason = ""
        self._content = hashlib.sha256()
        self._folder = NewFolder(self.directory, replace_if=is_shard_set if overwrite else None)
        try:
            for part in PARTS:
                (self._folder.path / part).mkdir()
        except BaseException:
            self.discard()
            raise

    def __len__(self) -> int:
        return len(self._keys)

    def add(
        self,
        key: str,
        members: Mapping[str, bytes],
        labels: np.ndarray | None = None,
        *,
        source: str | None = None,
        values: Mapping[str, float] | None = None,
    ) -> bool:
        """Checks one sample and appends it.

        Args:
            key: unique name: letters, digits, `_`, `-`.
            members: member name -> bytes, all but the labels ("cls"), which are made from `labels`. A document has
                "json" (`Document.encode`) and "page0000.jpg", "page0001.jpg", ...
            labels: [label_width] integers, -1 = none; None = there are none.
            source: file named in the rejects instead of the key.
            values: the sample's numbers in `columns`.

        Returns:
            False when the sample was rejected (something in it is bad); the reason is recorded.

        Raises:
            DataError: a key used twice, a label out of range, a missing member: mistakes of the caller.
        """
        own = self._check_call(key, members, labels, values or {})
        try:
            measures = self._checker.measure(members)
        except UnusableSampleError as error:
            return self._reject(source or key, f"{key}.{error.member}: {error}")
        if self._info.label_width:
            members = {**members, layout.LABELS_MEMBER: own.tobytes()}
        self._write_sample(key, members, own, measures, {**measures.columns, **(values or {})})
        self._keys[key] = None
        return True

    def add_file(self, name: str, content: bytes) -> None:
        """Puts a companion file (a vocabulary, a tool's settings) into the set's folder; it appears with the set.

        Raises:
            DataError: `name` is no plain file name, or one of the set's own.
        """
        if not re.fullmatch(r"\w[\w.-]*", name) or name in (layout.INFO_FILE, *PARTS):
            raise DataError(
                f"'{name}' cannot name a companion file of {self.directory}, because it is no plain file name or "
                "belongs to the set itself; choose another"
            )
        (self._folder.path / name).write_bytes(content)

    def close(self) -> None:
        """Writes the index and makes the shard set visible; after an error nothing is left.

        Raises:
            DataError: no sample was accepted.
            OSError: it cannot be written.
        """
        try:
            if not self._keys and not self._may_be_empty:
                first = self._first_reason or (self._rejects.first_reason if self._rejects is not None else "")
                reason = f"; the first one was refused because: {first}" if first else ""
                raise DataError(
                    f"no sample was accepted for {self.directory}, and an empty shard set cannot be trained on{reason}"
                )
            self._close_shard()
            self._write_index()
            self._folder.publish()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes everything written so far, also where the disk is full."""
        try:
            self._close_shard()
        except OSError:
            pass  # what is thrown away need not be whole
        finally:
            self._folder.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _reject(self, file: str, reason: str) -> bool:
        self._first_reason = self._first_reason or reason
        if self._rejects is not None:
            self._rejects.add(file, reason)
        else:
            _log.warning("rejected %s: %s", file, reason)
        return False

    def _check_call(
        self, key: str, members: Mapping[str, bytes], labels: np.ndarray | None, values: Mapping[str, float]
    ) -> np.ndarray:
        """Returns the labels as they are stored."""
        info = self._info
        if not is_valid_key(key):
            raise DataError(
                f"key '{key}' cannot name a sample, because names in a shard are 1 to {MAX_KEY_LENGTH} letters, "
                "digits, '_' or '-' (a dot would end the key); choose another"
            )
        if key in self._keys:
            raise DataError(
                f"key '{key}' is used twice in {self.directory}, and keys tell samples apart; make it unique"
            )
        expected = set(info.single_members) - {layout.LABELS_MEMBER}
        if info.has_pages:
            count = len(members) - len(expected)
            if not 1 <= count <= layout.MAX_PAGES:
                raise DataError(
                    f"document '{key}' has {max(count, 0)} pages, but one needs 1 to {layout.MAX_PAGES}; divide or "
                    "leave it out"
                )
            expected |= set(map(layout.page_member, range(count)))
        if set(members) != expected:
            odd = ", ".join(sorted(set(members) ^ expected)[:3])
            raise DataError(f"sample '{key}' lacks or has unknown members for kind {info.kind}: {odd}; correct them")
        measured = layout.DOCUMENT_COLUMNS if info.kind == "document" else {}
        if set(values) != set(info.columns) - set(measured):
            odd = ", ".join(sorted(set(values) ^ (set(info.columns) - set(measured)))[:3])
            raise DataError(f"sample '{key}' lacks or has unknown values of columns: {odd}; correct them")
        for name, value in values.items():
            if not _survives(value, np.dtype(info.columns[name])):
                raise DataError(
                    f"sample '{key}' has {name} = {value!r}, which its column of {info.columns[name]} cannot hold; "
                    "correct the value or the column's type"
                )
        own = np.asarray(labels) if labels is not None else np.full(info.label_width, -1, np.int32)
        if own.dtype.kind not in "iu" or own.shape != (info.label_width,):
            raise DataError(
                f"labels of '{key}' are {own.dtype} of shape {list(own.shape)}, but {self.directory} has "
                f"label_width = {info.label_width}; give [{info.label_width}] integers, with -1 for none"
            )
        bad = own[(own < -1) | (own >= info.num_classes)]
        if bad.size:
            raise DataError(
                f"label {bad[0]} of '{key}' is outside 0..{info.num_classes - 1} (num_classes = {info.num_classes}; "
                "-1 = none); correct the label or num_classes"
            )
        return np.ascontiguousarray(own, np.dtype("<i4"))

    def _write_sample(
        self,
        key: str,
        members: Mapping[str, bytes],
        labels: np.ndarray,
        measures: Measures,
        values: Mapping[str, float],
    ) -> None:
        number, place = divmod(len(self._keys), self._samples_per_shard)
        if self._shard is None or place == 0:
            self._close_shard()
            self._shard = _OpenShard(self._folder.path / "shards" / layout.shard_name(number))
            self._shards.append((len(self._keys), 0))
        info, pages = self._info, sorted(members.keys() - set(self._info.single_members))
        order = [one for name in info.members for one in (pages if name == layout.PAGES_MEMBER else [name])]
        places = self._shard.write(key, [(name, members[name]) for name in order])
        self._content.update(f"{key} {len(order)}\n".encode())
        for name in order:
            self._content.update(f"{name} {len(members[name])}\n".encode() + members[name])
        self._shards[-1] = (self._shards[-1][0], sum(places[-1]))
        row = np.zeros((), info.row_type)
        row["offset"] = places[0][0]
        row["sizes"] = [len(members[name]) for name in info.single_members]
        if info.label_width:
            row["labels"] = labels
        for name, value in values.items():
            row[name] = value
        self._content.update(row.tobytes())
        self._rows += row.tobytes()
        if info.has_pages:
            self._sizes[index.PAGE_COUNT].append(len(pages))
            for name, (height, width) in zip(pages, measures.sizes, strict=True):
                for column, value in (("page_height", height), ("page_width", width)):
                    self._sizes[column].append(value)
                self._sizes[index.PAGE_BYTES].append(len(members[name]))
        else:
            (height, width) = measures.sizes[0]
            for column, value in (("width", width), ("height", height), ("num_patches", measures.num_patches)):
                self._sizes[column].append(value)

    def _close_shard(self) -> None:
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.close()

    def _write_index(self) -> None:
        info = layout.DatasetInfo(
            **{
                **vars(self._info),
                "num_samples": len(self._keys),
                "num_pages": len(self._sizes[index.PAGE_BYTES]),
                "most_pages": max(self._sizes[index.PAGE_COUNT], default=0),
                "content": self._content.hexdigest()[:32],
            }
        )
        arrays: dict[str, np.ndarray] = {name: np.asarray(values) for name, values in self._sizes.items()}
        arrays[index.ROWS] = np.frombuffer(bytes(self._rows), info.row_type)
        arrays[index.KEYS] = np.array([key.encode() for key in self._keys], dtype=None if self._keys else "S1")
        arrays[index.SHARDS] = np.array(self._shards, dtype=index.SHARD_TYPE)
        for name in index.index_files(info):
            np.save(self._folder.path / "index" / f"{name}.npy", arrays[name])
        info.write(self._folder.path)


def is_shard_set(directory: Path) -> bool:
    """Whether `directory` holds a shard set and nothing else, so that replacing it loses nothing of a user's."""
    try:
        layout.DatasetInfo.read(directory)
        names = {entry.name for entry in directory.iterdir()}
        caches = {name for name in names if _TOKENS.fullmatch(name)}
        own = all(_IN_TOKENS.fullmatch(entry.name) for name in caches for entry in (directory / name).iterdir())
        parts = [f"{part}/{entry.name}" for part in names.intersection(PARTS) for entry in (directory / part).iterdir()]
    except (DataError, OSError):
        return False
    return own and names - caches <= {layout.INFO_FILE, *PARTS, *COMPANIONS} and all(map(_IN_PARTS.fullmatch, parts))


def _survives(value: object, dtype: np.dtype) -> bool:
    """Whether a number is the same, or for floats nearly so, after it was stored."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    if dtype.kind == "f":
        return bool(not np.isfinite(value) or abs(value) <= np.finfo(dtype).max)
    limits = np.iinfo(dtype)
    return bool(np.isfinite(value) and value == int(value) and limits.min <= value <= limits.max)


def _check_settings(info: layout.DatasetInfo, directory: Path) -> None:
    has_labels = info.kind != "document" or max(info.num_classes, info.label_width) != 0
    if info.patch_size < 1 or (has_labels and min(info.num_classes, info.label_width) < 1):
        raise DataError(
            f"num_classes = {info.num_classes}, label_width = {info.label_width} and patch_size = {info.patch_size} "
            f"must all be at least 1; correct them for {directory}"
        )
    if not layout.are_columns(dict(info.columns)):
        raise DataError(
            f"the columns {dict(info.columns)} of {directory} are not names and types of numbers like "
            "{'score': 'float32'}, or have a name of the index's own; correct them"
        )
    if info.kind == "video" and (
        not info.grid_height or not info.grid_width or not 1 <= info.frames <= layout.MAX_FRAMES
    ):
        raise DataError(
            f"a video shard set needs grid_height and grid_width (given: {info.grid_height}, {info.grid_width}) and 1 "
            f"to 100 frames (given: {info.frames}); correct them for {directory}"
        )


class _OpenShard:
    """A tar file and its DALI index ("v1.2", as DALI's wds2idx writes it) in the making."""

    def __init__(self, path: Path) -> None:
        self._tar = path.open("wb")
        self._index_path = path.with_name(path.name + ".idx")
        self._lines: list[str] = []

    def write(self, key: str, members: Sequence[tuple[str, bytes]]) -> list[tuple[int, int]]:
        """Appends a sample; returns (offset, size) of each member's bytes."""
        places = []
        for name, data in members:
            self._tar.write(layout.tar_header(f"{key}.{name}", len(data)))
            places.append((self._tar.tell(), len(data)))
            self._tar.write(data + b"\0" * (-len(data) % layout.TAR_BLOCK))
        entries = zip(members, places, strict=True)
        self._lines.append(" ".join(f"{name} {offset} {size} {key}.{name}" for (name, _), (offset, size) in entries))
        return places

    def close(self) -> None:
        """Ends the tar file and writes the index."""
        with self._tar:
            self._tar.write(b"\0" * (2 * layout.TAR_BLOCK))
        text = "\n".join([f"v1.2 {len(self._lines)}", *self._lines, ""])
        self._index_path.write_text(text, encoding="ascii")
