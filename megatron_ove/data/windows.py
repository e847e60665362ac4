"""`Windows`: which part of each picture is seen, how large, and whether mirrored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """What to make of each picture.

    Attributes:
        corner: [n, 2] int32, (y, x) of the window's upper left pixel.
        extent: [n, 2] int32, (height, width) of the window in pixels.
        size: [n, 2] int32, (height, width) after resizing.
        mirror: [n] int32, 1 = mirrored from left to right.
    """

    corner: np.ndarray
    extent: np.ndarray
    size: np.ndarray
    mirror: np.ndarray
