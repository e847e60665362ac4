"""A picture as one vector whose cosine says how alike two pictures are.

`ColourAndGradientDescriber` needs no trained weights: colours and edge layout, enough to group pictures of the same
scene. It is the laptop default. A production concept bank is made with a vision model (`model_folder.py`). A clip's
descriptor is its frames' descriptors one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.clustering.model_folder import FolderModelDescriber

_SIDE = 64  # pixels; both halves are computed on a picture of this size
_COLOUR_BINS = (8, 6, 6)  # L, a, b
_COLOUR_CELLS = 4  # mean colours on a 4 x 4 grid
_GRADIENT_CELLS = 8
_GRADIENT_BINS = 9


class Describer(Protocol):
    """Turns pictures into vectors. Those of describers of one name can be compared."""

    @property
    def name(self) -> str: ...

    def describe(self, picture: np.ndarray) -> np.ndarray:
        """Returns [d] float32 of length 1 for a [height, width, 3] uint8 RGB picture."""
        ...


class ColourAndGradientDescriber:
    """Square roots of a Lab colour histogram, a 4 x 4 grid of mean colours, and histograms of oriented gradients.

    Source: the Hellinger map of histograms (Arandjelovic and Zisserman 2012) and HOG (Dalal and Triggs 2005, without
    overlapping blocks).
    """

    name = "colour-and-gradient-1"

    def describe(self, picture: np.ndarray) -> np.ndarray:
        """See `Describer.describe`; d = 288 + 48 + 576."""
        small = cv2.resize(picture, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB)
        parts = (_colour_histogram(lab), _colour_layout(lab), _oriented_gradients(lab[..., 0]))
        return _normalised(np.concatenate([_normalised(part) for part in parts]))


def build_describer(model_folder: str | Path | None = None, *, trust_remote_code: bool = False) -> Describer:
    """Returns the default describer, or the model in `model_folder`.

    Raises:
        DataError: see `FolderModelDescriber`.
    """
    if model_folder is None:
        return ColourAndGradientDescriber()
    return FolderModelDescriber(model_folder, trust_remote_code=trust_remote_code)


def describe_clip(frames: np.ndarray, describer: Describer, *, num_frames: int) -> np.ndarray:
    """Describes a clip by `num_frames` of its frames, evenly spaced, one after the other.

    Args:
        frames: [t, height, width, 3] uint8 RGB.
        describer: describes a single frame.
        num_frames: frames used; the order matters, so a movement and its reverse differ.

    Returns:
        [num_frames * d] float32 of length 1.
    """
    if not 1 <= num_frames <= len(frames):
        raise DataError(f"num_frames = {num_frames} frames cannot be taken of a clip with {len(frames)}; choose fewer")
    edges = (np.arange(num_frames) + 0.5) * len(frames) / num_frames
    return _normalised(np.concatenate([describer.describe(frames[int(edge)]) for edge in edges]))


def _normalised(vector: np.ndarray) -> np.ndarray:
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


def _colour_histogram(lab: np.ndarray) -> np.ndarray:
    bins = [lab[..., channel].astype(np.int64) * count // 256 for channel, count in enumerate(_COLOUR_BINS)]
    flat = (bins[0] * _COLOUR_BINS[1] + bins[1]) * _COLOUR_BINS[2] + bins[2]
    return np.sqrt(np.bincount(flat.ravel(), minlength=int(np.prod(_COLOUR_BINS))))


def _colour_layout(lab: np.ndarray) -> np.ndarray:
    cell = _SIDE // _COLOUR_CELLS
    means = lab.reshape(_COLOUR_CELLS, cell, _COLOUR_CELLS, cell, 3).mean(axis=(1, 3))
    return means.ravel() - 128.0


def _oriented_gradients(luma: np.ndarray) -> np.ndarray:
    """Histograms of unsigned edge directions, weighted by strength, per cell; [cells * cells * bins]."""
    grey = luma.astype(np.float32)
    across, down = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    direction = (np.arctan2(down, across) % np.pi) / np.pi * _GRADIENT_BINS
    low = direction.astype(np.int64) % _GRADIENT_BINS
    share = direction - np.floor(direction)  # split between the two nearest bins
    strength = np.hypot(across, down)
    index = np.arange(_SIDE) * _GRADIENT_CELLS // _SIDE
    cell = (index[:, None] * _GRADIENT_CELLS + index[None, :]) * _GRADIENT_BINS
    size = _GRADIENT_CELLS**2 * _GRADIENT_BINS
    histogram = np.bincount((cell + low).ravel(), (strength * (1 - share)).ravel(), size)
    histogram += np.bincount((cell + (low + 1) % _GRADIENT_BINS).ravel(), (strength * share).ravel(), size)
    return np.sqrt(histogram)
