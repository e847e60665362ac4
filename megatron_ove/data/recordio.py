"""MXNet's indexed RecordIO (`X.rec` + `X.idx`), in which the reference stores images and pages; no mxnet needed.

A record: u32 magic, u32 (3 bits part flag | 29 bits length), payload, zeros up to a multiple of 4 bytes. A payload
that contains the magic at a multiple of 4 bytes is cut there into parts (flags 1 = first, 2 = middle, 3 = last) and the
magic is left out. A picture's payload: u32 number of labels (0 = one, in the next field), f32 label, u64 id, u64 id2,
the labels as f32, the encoded picture. The index has one line "key <tab> byte offset" per record. All little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megatron_ove.errors import DataError

MAX_EXACT_LABEL = 1 << 24
"""float32 holds every integer below this; from here on neighbouring label ids become the same number."""

_MAGIC = struct.pack("<I", 0xCED7230A)
_HEADER = struct.Struct("<IfQQ")
_LENGTH_BITS = 29
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


class RecordWriter:
    """Writes `X.rec` and `X.idx`; use as a context manager."""

    def __init__(self, prefix: str | Path) -> None:
        """Opens `prefix`.rec and `prefix`.idx for writing."""
        prefix = Path(prefix)
        self._records = prefix.with_name(prefix.name + ".rec").open("wb")
        self._index = prefix.with_name(prefix.name + ".idx").open("w", encoding="ascii")

    def write(self, key: int, labels: np.ndarray, picture: bytes) -> None:
        """Appends a picture with its labels, [L] integers below 2**24.

        Raises:
            DataError: a label that float32 cannot hold.
        """
        values = np.asarray(labels)
        if values.size and np.abs(values).max() >= MAX_EXACT_LABEL:
            raise DataError(_inexact(float(values.max()), f"record {key}"))
        if values.size == 1:
            header = _HEADER.pack(0, float(values[0]), key, 0)
        else:
            header = _HEADER.pack(values.size, 0.0, key, 0) + values.astype("<f4").tobytes()
        self._index.write(f"{key}\t{self._records.tell()}\n")
        parts = _split_at_magic(header + picture)
        for i, part in enumerate(parts):
            flag = _WHOLE if len(parts) == 1 else _FIRST if i == 0 else _LAST if i == len(parts) - 1 else _MIDDLE
            self._records.write(_MAGIC + struct.pack("<I", flag << _LENGTH_BITS | len(part)))
            self._records.write(part + b"\0" * (-len(part) % 4))

    def close(self) -> None:
        self._records.close()
        self._index.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: str | Path) -> Iterator[PictureRecord]:
    """Reads the records of a .rec file in the order of its .idx file.

    Args:
        path: the .rec file; the index has the same name with .idx.

    Raises:
        DataError: a file is missing, cut off, or no RecordIO.
    """
    path = Path(path)
    entries = _read_index(path)
    with path.open("rb") as stream:
        for key, offset in entries:
            stream.seek(offset)
            yield _parse_picture(key, _read_payload(stream, path, offset), path)


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
    if not np.array_equal(labels, np.rint(labels)):
        bad = labels[labels != np.rint(labels)][0]
        raise DataError(f"record {record.key} of {path} has the label {bad}, which is no whole number; check the file")
    if labels.size and np.abs(labels).max() >= MAX_EXACT_LABEL:
        raise DataError(_inexact(float(labels.max()), f"record {record.key} of {path}"))
    if zeros_mean_none and not labels.any():
        return np.full(labels.shape, -1, dtype=np.int32)
    return labels.astype(np.int32)


def _inexact(label: float, place: str) -> str:
    return (
        f"{place} has the label {label:.0f}, but this format stores labels as float32, which is exact only below 2**24 "
        f"= {MAX_EXACT_LABEL}, so ids would be mixed up; make the shard set from the original labels"
    )


def _split_at_magic(payload: bytes) -> list[bytes]:
    cuts, place = [], payload.find(_MAGIC)
    while place >= 0:
        if place % 4 == 0:
            cuts.append(place)
        place = payload.find(_MAGIC, place + (4 if place % 4 == 0 else 1))
    starts, stops = [0, *(cut + 4 for cut in cuts)], [*cuts, len(payload)]
    return [payload[start:stop] for start, stop in zip(starts, stops, strict=True)]


def _read_index(path: Path) -> list[tuple[int, int]]:
    index_path = path.with_suffix(".idx")
    try:
        lines = index_path.read_text(encoding="ascii").splitlines()
        entries = [(int(key), int(offset)) for key, offset in (line.split() for line in lines if line.strip())]
    except OSError as error:
        raise DataError(f"the index {index_path} of {path} cannot be read ({error.strerror}); copy it again") from error
    except ValueError as error:
        raise DataError(f"{index_path} is no RecordIO index (lines of key, tab, offset); check the file") from error
    if not path.is_file():
        raise DataError(f"the record file {path} does not exist; check the path")
    if not entries:
        raise DataError(f"{index_path} lists no records, so there is nothing to read; copy it again")
    return entries


def _read_payload(stream: BinaryIO, path: Path, offset: int) -> bytes:
    payload = b""
    while True:
        header = stream.read(8)
        if len(header) == 8 and header[:4] != _MAGIC:
            raise DataError(
                f"{path} has no record at byte {offset}, where its index places one; .rec and .idx are from different "
                "files: copy both again"
            )
        flag, length = divmod(int.from_bytes(header[4:], "little"), 1 << _LENGTH_BITS)
        part = stream.read(length)
        if len(header) < 8 or len(part) < length:
            raise DataError(f"{path} ends inside the record at byte {offset}, so it is truncated; copy it again")
        stream.read(-length % 4)
        payload = part if flag in (_WHOLE, _FIRST) else payload + _MAGIC + part
        if flag in (_WHOLE, _LAST):
            return payload


def _parse_picture(key: int, payload: bytes, path: Path) -> PictureRecord:
    if len(payload) < _HEADER.size:
        raise DataError(f"record {key} of {path} is shorter than a picture header; check what the file holds")
    count, label, _, _ = _HEADER.unpack_from(payload)
    start = _HEADER.size + 4 * count
    if len(payload) < start:
        raise DataError(f"record {key} of {path} promises {count} labels but ends before; check what the file holds")
    labels = np.frombuffer(payload, "<f4", count, _HEADER.size) if count else np.array([label], dtype=np.float32)
    return PictureRecord(key, labels, payload[start:])
