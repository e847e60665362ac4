"""`RecordWriter`: RecordIO files as the program that wrote published ones lays them out, for tests of our reader."""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.shards.recordio import (
    _FIRST,
    _HEADER,
    _LAST,
    _LENGTH_BITS,
    _MAGIC,
    _MIDDLE,
    _WHOLE,
    MAX_EXACT_LABEL,
    _inexact,
)


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
        inexact = values[np.abs(values) >= MAX_EXACT_LABEL]
        if inexact.size:
            raise DataError(_inexact(float(inexact[0]), f"record {key}"))
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


def _split_at_magic(payload: bytes) -> list[bytes]:
    cuts, place = [], payload.find(_MAGIC)
    while place >= 0:
        if place % 4 == 0:
            cuts.append(place)
        place = payload.find(_MAGIC, place + (4 if place % 4 == 0 else 1))
    starts, stops = [0, *(cut + 4 for cut in cuts)], [*cuts, len(payload)]
    return [payload[start:stop] for start, stop in zip(starts, stops, strict=True)]
