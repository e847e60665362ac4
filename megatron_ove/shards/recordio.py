"""MXNet's indexed RecordIO (`X.rec` + `X.idx`), in which the reference stores images and pages; no mxnet needed.

A record: u32 magic, u32 (3 bits part flag | 29 bits length), payload, zeros up to a multiple of 4 bytes. A payload
that contains the magic at a multiple of 4 bytes is cut there into parts (flags 1 = first, 2 = middle, 3 = last) and the
magic is left out. A picture's payload: u32 number of labels (0 = one, in the next field), f32 label, u64 id, u64 id2,
the labels as f32, the encoded picture. The index has one line "key <tab> byte offset" per record. All little-endian.

Sets of faces as insightface packs them begin with a record that holds no picture: key 0, labels [f, l]. Their pictures
have the keys 1 .. f - 1, and f .. l - 1 are records without a picture too, one an identity with its range of pictures.
"""

from __future__ import annotations

import logging
import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_ove.errors import DataError

_log = logging.getLogger(__name__)

MAX_EXACT_LABEL = 1 << 24
"""float32 holds every integer below this; from here on neighbouring label ids become the same number."""

_MAGIC = struct.pack("<I", 0xCED7230A)
_HEADER = struct.Struct("<IfQQ")
_LENGTH_BITS = 29
_MAX_KEY = (1 << 63) - 1
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)


@dataclass(frozen=True)
class PictureRecord:
    """One record.

    Attributes:
        key: from the index.
        labels: [L] float32, as stored.
        picture: encoded bytes.
    """

    key: int
    labels: np.ndarray
    picture: bytes


class PictureFile:
    """The pictures of a .rec file, in the order of its .idx file.

    Attributes:
        path: the .rec file.
        is_face_set: whether it begins with insightface's header: labels are then the identity alone, because some of
            these sets store a filler (0) behind it.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the index, which has the same name with .idx; without one the records are found by reading `path`.

        Raises:
            DataError: a file is missing, cut off, or no RecordIO.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"the record file {path} does not exist; check the path")
        self._size = self.path.stat().st_size
        if not self._size:
            raise DataError(f"{path} is empty (0 bytes), so there is nothing to read; copy it again")
        keys, offsets = _tell_apart(self.path, *(_read_index(self.path) or _scan(self.path)))
        self._check_offsets(offsets)
        first_identity = self._first_identity(keys, offsets)
        self.is_face_set = first_identity is not None
        if first_identity is not None:
            is_picture = (keys >= 1) & (keys < first_identity)
            keys, offsets = keys[is_picture], offsets[is_picture]
            if len(keys) != first_identity - 1:
                _log.warning(
                    "the header of %s promises %d pictures, but its index lists %d of them; only these are there.",
                    *(path, first_identity - 1, len(keys)),
                )
        self._keys, self._offsets = keys, offsets

    def __len__(self) -> int:
        return len(self._keys)

    def records(self, *, rejected: Callable[[int, str], None] | None = None) -> Iterator[PictureRecord]:
        """Reads the pictures.

        Args:
            rejected: gets the key of a record that holds no picture record, and the reason; None = that is an error.

        Raises:
            DataError: the file is damaged.
        """
        with self.path.open("rb") as stream:
            for key, offset in zip(self._keys.tolist(), self._offsets.tolist(), strict=True):
                payload = _read_payload(stream, self.path, offset)
                try:
                    record = _parse_picture(key, payload, self.path)
                except DataError as error:
                    if rejected is None:
                        raise
                    rejected(key, str(error))
                    continue
                yield replace(record, labels=record.labels[:1]) if self.is_face_set else record

    def _check_offsets(self, offsets: np.ndarray) -> None:
        wrong = offsets[(offsets < 0) | (offsets >= self._size)]
        if wrong.size:
            raise DataError(
                f"the index of {self.path} places a record at byte {wrong[0]}, but the file has {self._size} bytes, so "
                "it is truncated or the index is of another file; copy both again"
            )
        with self.path.open("rb") as stream:  # a cut file is noticed now, not after hours
            _read_payload(stream, self.path, int(offsets.max()))

    def _first_identity(self, keys: np.ndarray, offsets: np.ndarray) -> int | None:
        """Returns the key behind the last picture of a face set; None for any other file."""
        header = self._without_picture(keys, offsets, 0)
        if header is None or len(header) != 2 or not (np.isfinite(header).all() and 1 < header[0] <= header[1]):
            return None
        first = int(header[0])
        if first < MAX_EXACT_LABEL:
            return first
        # From here on float32 counts in steps, and the first record without a picture is meant.
        step = int(np.spacing(header[0]))
        near = range(first - step, first + step + 1)
        return next((key for key in near if self._without_picture(keys, offsets, key) is not None), first)

    def _without_picture(self, keys: np.ndarray, offsets: np.ndarray, key: int) -> np.ndarray | None:
        """Returns the labels of a record that holds no picture; None if it holds one, or there is no such record."""
        places = np.flatnonzero(keys == key)
        if not places.size:
            return None
        with self.path.open("rb") as stream:
            payload = _read_payload(stream, self.path, int(offsets[places[0]]))
        try:
            record = _parse_picture(key, payload, self.path)
        except DataError:
            return None
        return None if record.picture else record.labels


def read_records(path: str | Path) -> Iterator[PictureRecord]:
    """Reads the pictures of a .rec file; see `PictureFile`.

    Raises:
        DataError: a file is missing, cut off, or no RecordIO.
    """
    return PictureFile(path).records()


def integer_labels(record: PictureRecord, path: str | Path, *, zeros_mean_none: bool) -> np.ndarray:
    """Returns a record's labels as [L] int32.

    Args:
        record: what was read.
        path: its file, for messages.
        zeros_mean_none: whether all-zero labels mean "no label" (-1), as in the reference's pages without words, which
            would otherwise all be trained as class 0.

    Raises:
        DataError: a label that is no integer, or one that float32 cannot hold exactly.
    """
    labels = record.labels
    broken = labels[~np.isfinite(labels) | (labels != np.rint(labels))]
    if broken.size:
        raise DataError(
            f"record {record.key} of {path} has the label {broken[0]}, which is no whole number; check the file"
        )
    inexact = labels[np.abs(labels) >= MAX_EXACT_LABEL]
    if inexact.size:
        raise DataError(_inexact(float(inexact[0]), f"record {record.key} of {path}"))
    if zeros_mean_none and not labels.any():
        return np.full(labels.shape, -1, dtype=np.int32)
    return labels.astype(np.int32)


def _inexact(label: float, place: str) -> str:
    return (
        f"{place} has the label {label:.0f}, but this format stores labels as float32, which is exact only below 2**24 "
        f"= {MAX_EXACT_LABEL}, so ids would be mixed up; make the shard set from the original labels"
    )


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns keys and offsets, int64, in the order of the index; None if there is none."""
    index_path = path.with_suffix(".idx")
    keys, offsets = array("q"), array("q")
    try:
        with index_path.open(encoding="utf-8-sig") as stream:  # some editors put a mark before the first key
            for line in stream:
                if line.strip():
                    key, offset = line.split()
                    keys.append(int(key))
                    offsets.append(int(offset))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"the index {index_path} of {path} cannot be read ({error.strerror}); copy it again") from error
    except (ValueError, OverflowError) as error:
        raise DataError(f"{index_path} is no RecordIO index (lines of key, tab, offset); check the file") from error
    if not keys:
        raise DataError(
            f"{index_path} lists no records; copy it again, or delete it, and the records are found by reading "
            f"{path.name}"
        )
    return np.frombuffer(keys, np.int64), np.frombuffer(offsets, np.int64)


def _scan(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Finds the records of a file without an index; their keys are the ids in their headers."""
    keys, offsets, end = array("q"), array("q"), path.stat().st_size
    with path.open("rb") as stream:
        while (offset := stream.tell()) < end:
            offsets.append(offset)
            payload = _read_payload(stream, path, offset)
            is_picture = len(payload) >= _HEADER.size
            keys.append(_HEADER.unpack_from(payload)[2] & _MAX_KEY if is_picture else len(keys))
    _log.warning("%s has no index beside it; its %d records were found by reading it.", path, len(keys))
    return np.frombuffer(keys, np.int64), np.frombuffer(offsets, np.int64)


def _tell_apart(path: Path, keys: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drops records that are listed twice, and numbers all by their place if different ones share a key."""
    first = np.sort(np.unique(offsets, return_index=True)[1])
    if len(first) < len(offsets):
        _log.warning(
            "the index of %s lists records more than once (%d lines); each is read once.",
            path,
            len(offsets) - len(first),
        )
        keys, offsets = keys[first], offsets[first]
    if len(np.unique(keys)) < len(keys):
        _log.warning("different records of %s have one key, so all are numbered by their place instead.", path)
        keys = np.arange(len(keys))
    return keys, offsets


def _read_payload(stream: BinaryIO, path: Path, offset: int) -> bytes:
    """Reads the record at `offset` and leaves the stream behind it."""
    stream.seek(offset)
    parts: list[bytes] = []
    while True:
        header = stream.read(8)
        if len(header) == 8 and header[:4] != _MAGIC:
            raise DataError(
                f"{path} has no record at byte {offset}, where one should begin; .rec and .idx are from different "
                "files, or damaged: copy both again"
            )
        flag, length = divmod(int.from_bytes(header[4:], "little"), 1 << _LENGTH_BITS)
        part = stream.read(length)
        if len(header) < 8 or len(part) < length:
            raise DataError(f"{path} ends inside the record at byte {offset}, so it is truncated; copy it again")
        if flag not in ((_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)):
            raise DataError(f"the record at byte {offset} of {path} has its parts in a wrong order; copy it again")
        stream.read(-length % 4)
        parts.append(part)
        if flag in (_WHOLE, _LAST):
            return _MAGIC.join(parts)


def _parse_picture(key: int, payload: bytes, path: Path) -> PictureRecord:
    if len(payload) < _HEADER.size:
        raise DataError(f"record {key} of {path} is shorter than a picture header; check what the file holds")
    count, label, _, _ = _HEADER.unpack_from(payload)
    start = _HEADER.size + 4 * count
    if len(payload) < start:
        raise DataError(f"record {key} of {path} promises {count} labels but ends before; check what the file holds")
    labels = np.frombuffer(payload, "<f4", count, _HEADER.size) if count else np.array([label], dtype=np.float32)
    return PictureRecord(key, labels, payload[start:])
