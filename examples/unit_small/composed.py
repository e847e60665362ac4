"""Composed pictures: a photograph of one thing on a ground, with captions that follow from how it was put together.

The captions are generated, not written by people: they are always right, and always of the same few forms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ove.preprocess.demo_input.images import random_crop, recolour, resize
from megatron_ove.preprocess.photographs import TEXTURES, load_photograph, photograph_names

SIDE = 56
"""Pixels; four patches of 14."""
THINGS = tuple(name for name in photograph_names() if name not in TEXTURES)
GROUNDS = (*TEXTURES, "paper")
NUM_CONCEPTS = len(THINGS) * len(GROUNDS)
_PLACES = {(-1, -1): "top left", (1, -1): "top right", (-1, 1): "bottom left", (1, 1): "bottom right"}


@dataclass(frozen=True)
class Composed:
    """A picture.

    Attributes:
        pixels: [SIDE, SIDE, 3] uint8 RGB.
        concept: which thing on which ground, 0 .. NUM_CONCEPTS - 1.
        captions: two, either of which may be said of it.
    """

    pixels: np.ndarray
    concept: int
    captions: tuple[str, str]


def compose(seed: int, number: int) -> Composed:
    """Returns picture `number` of a set; a pure function of both."""
    random = np.random.default_rng((seed, number))
    concept = int(random.integers(NUM_CONCEPTS))
    thing, ground = THINGS[concept // len(GROUNDS)], GROUNDS[concept % len(GROUNDS)]
    if ground == "paper":
        pixels = np.full((SIDE, SIDE, 3), random.integers(150, 256, 3), np.uint8)
    else:
        cut = random_crop(load_photograph(ground), random, area=(0.1, 0.3))
        pixels = resize(recolour(cut, random), SIDE, SIDE)

    photograph = recolour(random_crop(load_photograph(thing), random, area=(0.4, 0.9)), random)
    width, height = (int(side) for side in random.integers(int(0.55 * SIDE), int(0.8 * SIDE), 2))
    photograph = resize(photograph[:, ::-1] if random.random() < 0.5 else photograph, width, height)
    left, top = (int(random.integers(SIDE - side + 1)) for side in (width, height))
    pixels[top : top + height, left : left + width] = photograph
    place = _PLACES[1 if 2 * left + width > SIDE else -1, 1 if 2 * top + height > SIDE else -1]
    return Composed(pixels, concept, (f"{thing} on {ground}", f"{thing} at the {place}"))
