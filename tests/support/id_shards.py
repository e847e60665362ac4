"""Shard sets whose pictures say which sample they are: one flat colour each, so that no crop or resize hides it.

Red = number of the sample, green = 255 - red, blue = 3 * frame (0 for pictures). PNG, so colours are exact.
"""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_ove.batch import Batch
from megatron_ove.data.patchify import grid_positions
from megatron_ove.data.synthetic import build_mosaic
from megatron_ove.shards.format import Kind, frame_member
from megatron_ove.shards.writer import ShardWriter

GRID = (16, 2, 3)
"""(frames, rows, columns) of the clips."""
NUM_CLASSES = 256
PATCH = 14


def encode(picture: np.ndarray, image_format: str = "PNG", **options: object) -> bytes:
    """Returns `picture`, [height, width, 3] uint8, encoded."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, image_format, **options)
    return stream.getvalue()


def id_picture(number: int, height: int, width: int, frame: int = 0) -> np.ndarray:
    """Returns [height, width, 3] uint8 in the colour of sample `number`."""
    return np.full((height, width, 3), (number, 255 - number, 3 * frame), dtype=np.uint8)


def npy_bytes(array: np.ndarray) -> bytes:
    """Returns `array` as the bytes of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def clip_members(number: int, selected: int) -> dict[str, bytes]:
    """Returns the members of clip `number` with its first `selected` patches of every second place selected."""
    frames, rows, columns = GRID
    positions = np.concatenate([grid_positions(rows, columns, frame=t) for t in range(frames)])[::2][:selected]
    patches = np.stack([id_picture(number, PATCH, PATCH, int(t)) for t in positions[:, 0]])
    pictures = {frame_member(t): encode(id_picture(number, rows * PATCH, columns * PATCH, t)) for t in range(frames)}
    return {"codec.jpg": encode(build_mosaic(patches)), "positions.npy": npy_bytes(positions), **pictures}


def write_id_shard_set(
    directory: Path, kind: Kind, count: int, *, label_width: int = 3, samples_per_shard: int = 7
) -> Path:
    """Writes `count` <= 256 samples "<kind><number>" with labels [number, -1, ...] and varying sizes."""
    frames, rows, columns = GRID
    with ShardWriter(
        directory,
        kind=kind,
        num_classes=NUM_CLASSES,
        label_width=label_width,
        samples_per_shard=samples_per_shard,
        patch_size=PATCH,
        frames=frames,
        grid_height=rows,
        grid_width=columns,
    ) as writer:
        for i in range(count):
            members = (
                clip_members(i, 10 + i % 5)
                if kind == "video"
                else {"jpg": encode(id_picture(i, 30 + 9 * (i % 5), 80 - 7 * (i % 6)))}
            )
            labels = np.full(label_width, -1, dtype=np.int32)
            labels[0] = i
            assert writer.add(f"{kind}{i}", members, labels)
    return directory


def sample_ids(batch: Batch) -> list[int]:
    """Reads from the pixels which sample each segment of a batch is; checks that all its patches agree."""
    patches = batch.main.patches
    assert patches is not None
    bounds, ids = batch.main.cu_seqlens.tolist(), []
    for start, stop in pairwise(bounds):
        pixels = patches[start:stop].view(stop - start, 3, -1)
        red = int(pixels[0, 0, 0])
        assert (pixels[:, 0] == red).all()
        assert (pixels[:, 1] == 255 - red).all()
        ids.append(red)
    return ids
