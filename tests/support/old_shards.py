"""Shard sets of format 1, which this version reads and does not write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_ove.shards.shard_set import ShardSet


def to_first_format(directory: Path) -> None:
    """Gives a shard set the index that format 1 has; its tar files are the same in both."""
    shards = ShardSet.open(directory)
    rows, members = range(len(shards)), shards.info.members
    places = np.array([[shards.index.place(row, member) for member in members] for row in rows])  # [n, m, 2]
    arrays = {
        "offsets": places[:, :, 0].astype(np.uint64),
        "sizes": places[:, :, 1].astype(np.uint32),
        "shard": np.array([shards.index.shard_of(row) for row in rows], dtype=np.uint32),
        "labels": np.array(shards.labels, dtype=np.int32),
        **{name: np.array(shards.columns[name]) for name in ("width", "height", "num_patches", "keys")},
    }
    for path in (directory / "index").iterdir():
        path.unlink()
    for name, array in arrays.items():
        np.save(directory / "index" / f"{name}.npy", array)
    info = json.loads((directory / "dataset.json").read_text())
    for name in ("num_pages", "most_pages", "num_parts", "columns", "content"):
        del info[name]
    (directory / "dataset.json").write_text(json.dumps({**info, "format_version": 1}))
