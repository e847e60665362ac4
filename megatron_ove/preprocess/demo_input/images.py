"""Variants of a photograph: crops at many zooms, mirrored, recoloured, some on another background."""

from __future__ import annotations

import cv2
import numpy as np

from megatron_ove.preprocess.photographs import TEXTURES, load_photograph

_BACKGROUND_SHARE = 0.3


def draw_variant(name: str, random: np.random.Generator) -> np.ndarray:
    """Draws a variant of the photograph called `name`.

    Returns:
        [height, width, 3] uint8 RGB, 144 to 256 pixels a side.
    """
    picture = recolour(random_crop(load_photograph(name), random, area=(0.15, 0.8)), random)
    if random.random() < 0.5:
        picture = picture[:, ::-1]
    width, height = (int(side) for side in random.integers(144, 257, 2))
    if random.random() >= _BACKGROUND_SHARE:
        return resize(picture, width, height)
    texture = TEXTURES[int(random.integers(len(TEXTURES)))]
    canvas = resize(recolour(random_crop(load_photograph(texture), random, area=(0.2, 0.6)), random), width, height)
    inner = resize(picture, int(width * random.uniform(0.6, 0.85)), int(height * random.uniform(0.6, 0.85)))
    top = int(random.integers(height - inner.shape[0] + 1))
    left = int(random.integers(width - inner.shape[1] + 1))
    canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return canvas


def random_crop(picture: np.ndarray, random: np.random.Generator, *, area: tuple[float, float]) -> np.ndarray:
    """Cuts out a share of the picture's area from the range, at 0.8 to 1.25 times its aspect; a view."""
    height, width = picture.shape[:2]
    share = random.uniform(*area)
    aspect = random.uniform(0.8, 1.25)
    crop_width = min(width, int(np.sqrt(share * aspect) * width))
    crop_height = min(height, int(np.sqrt(share / aspect) * height))
    top = int(random.integers(height - crop_height + 1))
    left = int(random.integers(width - crop_width + 1))
    return picture[top : top + crop_height, left : left + crop_width]


def recolour(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Changes white balance, brightness and gamma a little."""
    gain = random.uniform(0.85, 1.15, 3) * random.uniform(0.85, 1.1)
    levels = (np.arange(256) / 255.0)[:, None] ** random.uniform(0.8, 1.25) * gain
    table = np.clip(levels * 255.0, 0, 255).astype(np.uint8)  # [256, 3]
    return np.stack([table[picture[..., channel], channel] for channel in range(3)], axis=-1)


def resize(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scales a picture to a size, whatever its aspect."""
    method = cv2.INTER_AREA if width < picture.shape[1] else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=method)
