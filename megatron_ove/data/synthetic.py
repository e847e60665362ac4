"""Small shard sets of made-up pictures whose look follows from their class, for tests and benchmarks.

A class is a pair of colours and a stripe pattern, with noise and a random shift on top: a model that learns anything
tells the classes apart, and a broken label pairing shows at once.
"""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_ove.data.patchify import grid_positions
from megatron_ove.shards.format import (
    MOSAIC_COLUMNS,
    MOSAIC_MEMBER,
    PICTURE_MEMBER,
    POSITIONS_MEMBER,
    Kind,
    frame_member,
    mosaic_size,
)
from megatron_ove.shards.writer import ShardWriter


def write_synthetic_shard_set(
    directory: str | Path,
    *,
    kind: Kind,
    num_samples: int,
    num_classes: int = 8,
    label_width: int = 10,
    seed: int = 0,
    patch_size: int = 14,
    picture_size: tuple[int, int] = (70, 84),
    frames: int = 64,
    grid_height: int = 4,
    grid_width: int = 4,
    selected_patches: int = 48,
    samples_per_shard: int = 64,
) -> Path:
    """Writes a shard set of any kind.

    Args:
        directory: target folder; must not exist.
        kind: image, ocr or video.
        num_samples: samples; sample i has class i % num_classes.
        num_classes: label ids are 0 .. num_classes - 1.
        label_width: labels per sample: the class, then classes that follow it, but never all of them; -1 for the rest.
        seed: of noise and shifts.
        patch_size: side of a patch in pixels.
        picture_size: (height, width) in pixels of images and pages; they vary by up to a quarter around it.
        frames: frames of a clip's temporal grid.
        grid_height: patches of a frame from top to bottom.
        grid_width: patches of a frame from left to right.
        selected_patches: stored patches of a clip, chosen at random; every third clip has half as many.
        samples_per_shard: samples per tar file.

    Returns:
        The folder.
    """
    writer = ShardWriter(
        directory,
        kind=kind,
        num_classes=num_classes,
        label_width=label_width,
        samples_per_shard=samples_per_shard,
        patch_size=patch_size,
        frames=frames,
        grid_height=grid_height,
        grid_width=grid_width,
    )
    grid = (frames, grid_height, grid_width)
    with writer:
        for i in range(num_samples):
            random = np.random.default_rng((seed, i))
            label = i % num_classes if num_samples >= num_classes else i * num_classes // num_samples
            if kind == "video":
                count = selected_patches // 2 if i % 3 == 2 else selected_patches
                members = _clip_members(label, num_classes, grid, count, patch_size, random)
            else:
                height, width = (int(side * random.uniform(0.75, 1.25)) for side in picture_size)
                members = {PICTURE_MEMBER: encode_jpeg(class_picture(label, num_classes, height, width, 0, random))}
            writer.add(f"{kind}{i:06d}", members, class_labels(label, num_classes, label_width))
    return Path(directory)


def class_labels(label: int, num_classes: int, width: int) -> np.ndarray:
    """Returns [width] int32: the class, then all but one of those that follow it cyclically; -1 where they run out."""
    labels = np.full(width, -1, dtype=np.int32)
    count = min(width, max(1, num_classes - 1))
    labels[:count] = (label + np.arange(count)) % num_classes
    return labels


def class_picture(
    label: int, num_classes: int, height: int, width: int, shift: float, random: np.random.Generator
) -> np.ndarray:
    """Returns [height, width, 3] uint8: stripes in the class's two colours, direction and width, with noise.

    Args:
        label: the class.
        num_classes: classes that share the circle of hues and directions.
        height: pixels.
        width: pixels.
        shift: pixels by which the stripes have moved, e.g. with time.
        random: of noise and the stripes' starting point.
    """
    hue, angle = label / num_classes, np.pi * (label * 0.381966 % 1)
    colours = [np.array(colorsys.hsv_to_rgb((hue + turn) % 1, 0.8, value)) for turn, value in ((0, 0.9), (0.45, 0.5))]
    y, x = np.mgrid[:height, :width]
    period = 8 + 6 * (label % 3)
    wave = np.cos(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle) + shift + random.uniform(0, period)) / period)
    mix = (0.5 + 0.5 * wave)[..., None]
    picture = 255 * (mix * colours[0] + (1 - mix) * colours[1]) + random.normal(0, 8, (height, width, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


def encode_jpeg(picture: np.ndarray) -> bytes:
    """Returns `picture`, [height, width, 3] uint8 RGB, as a JPEG of quality 92 without chroma subsampling."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def build_mosaic(patches: np.ndarray) -> np.ndarray:
    """Lays patches out in rows of 16, padded with grey.

    Args:
        patches: [K, p, p, 3] uint8.

    Returns:
        [ceil(K / 16) * p, 16 * p, 3] uint8.
    """
    count, side = patches.shape[:2]
    height, width = mosaic_size(count, side)
    cells = np.full((height // side * MOSAIC_COLUMNS, side, side, 3), 128, dtype=np.uint8)
    cells[:count] = patches
    rows = cells.reshape(height // side, MOSAIC_COLUMNS, side, side, 3)
    return rows.transpose(0, 2, 1, 3, 4).reshape(height, width, 3)


def _clip_members(
    label: int,
    num_classes: int,
    grid: tuple[int, int, int],
    count: int,
    patch_size: int,
    random: np.random.Generator,
) -> dict[str, bytes]:
    frames, rows, columns = grid
    clip = np.stack(
        [
            class_picture(label, num_classes, rows * patch_size, columns * patch_size, 2.0 * t, random)
            for t in range(frames)
        ]
    )
    positions = np.concatenate([grid_positions(rows, columns, frame=t) for t in range(frames)])
    positions = positions[np.sort(random.choice(len(positions), min(count, len(positions)), replace=False))]
    cells = clip.reshape(frames, rows, patch_size, columns, patch_size, 3).transpose(0, 1, 3, 2, 4, 5)
    stream = io.BytesIO()
    np.save(stream, positions)
    return {
        MOSAIC_MEMBER: encode_jpeg(build_mosaic(cells[tuple(positions.T)])),
        POSITIONS_MEMBER: stream.getvalue(),
        **{frame_member(t): encode_jpeg(frame) for t, frame in enumerate(clip)},
    }
