"""Photographs that ship inside installed packages: scikit-image's data folder and matplotlib's sample data.

All are public domain, CC0, or without known restrictions (see the README of skimage/data; the portrait of Grace Hopper
is a US Navy photograph).
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.pictures import fit_longest_side, load_picture

_LONGEST_SIDE = 800
_FILES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "bricks": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "portrait": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
TEXTURES = ("bricks", "grass", "gravel")


def photograph_names() -> tuple[str, ...]:
    """Returns the names of all photographs, sorted."""
    return tuple(sorted(_FILES))


@cache
def load_photograph(name: str) -> np.ndarray:
    """Returns a photograph as [height, width, 3] uint8 RGB, at most 800 pixels a side; read-only.

    Raises:
        DataError: the package that ships it is missing.
    """
    package, file = _FILES[name]
    spec = importlib.util.find_spec(package)
    distribution = {"skimage": "scikit-image"}.get(package, package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the photograph {name} ships with {distribution}, which is not installed; run pip install {distribution}"
        )
    picture = fit_longest_side(load_picture(Path(spec.submodule_search_locations[0]) / file), _LONGEST_SIDE).copy()
    picture.setflags(write=False)
    return picture
