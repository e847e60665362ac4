"""Small inputs of the tools that make documents, and what a set of them says."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_ove.shards.documents import Document
from megatron_ove.shards.format import page_member
from megatron_ove.shards.shard_set import ShardSet


def picture(number: int = 0, *, size: tuple[int, int] = (60, 40), form: str = "PNG") -> bytes:
    """Returns a picture file that no other number gives; `size` is (width, height)."""
    stream = io.BytesIO()
    Image.new("RGB", size, (10 + 40 * (number % 6), 90, 160)).save(stream, form)
    return stream.getvalue()


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes] | tarfile.TarInfo], form: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            entry = tarfile.TarInfo(member[0])
            entry.size = len(member[1])
            tar.addfile(entry, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """Returns a member without content: a link, a device, ..."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def documents_of(folder: Path) -> dict[str, Document]:
    """Returns key -> document of a set."""
    shards = ShardSet.open(folder)
    return {shards.key(row): shards.read_document(row) for row in range(len(shards))}


def samples_of(folder: Path) -> list[tuple[str, bytes, tuple[bytes, ...], list[int]]]:
    """Returns (key, json, pages, labels) of every sample in order."""
    shards = ShardSet.open(folder)
    return [
        (
            shards.key(row),
            shards.read(row, "json"),
            tuple(shards.read(row, page_member(page)) for page in range(int(shards.num_pages[row]))),
            np.asarray(shards.labels[row]).tolist() if shards.info.label_width else [],
        )
        for row in range(len(shards))
    ]


def rejected(path: Path) -> dict[str, str]:
    """Returns the last part of a rejected file's name -> reason; fails where one is there twice."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = [Path(record["file"]).name for record in records]
    assert len(set(names)) == len(names), names
    return {name: record["reason"] for name, record in zip(names, records, strict=True)}


def write_lines(path: Path, *records: Mapping[str, object] | bytes) -> Path:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path
