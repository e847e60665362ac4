"""What pictures of text may look like: ranges that a picture's look is drawn from, and named ones from easy to hard."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ove.errors import DataError

_HIGHEST_LEVEL = 255


@dataclass(frozen=True)
class Chance:
    """Something that is done to a share of the pictures, with a strength from `low` to `high`."""

    share: float
    low: float
    high: float

    def draw(self, random: np.random.Generator) -> float | None:
        """Returns a strength, or None for a picture that it is not done to."""
        if self.share <= 0 or random.random() >= self.share:
            return None
        return float(random.uniform(self.low, self.high))


NEVER = Chance(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Look:
    """Ranges of a picture's look, both ends included; sizes in pixels, colours in levels 0 to 255.

    Attributes:
        size: of the text.
        first_typeface: whether everything is written in the first of the typefaces at hand that has the characters.
        place_step: a word's left and top are multiples of this; 0 = always the top left corner (where words are
            scattered; lines follow the page's margins).
        paper, ink: levels of red, green and blue, each drawn by itself.
        light_on_dark: share of pictures whose paper and ink change places.
        contrast: least difference of the grey levels of an ink and of any point of the ground, before grain and wear.
        gradient: strength: grey levels by which the paper changes across the picture.
        photograph: strength: how much of a photograph's own contrast its crop keeps as the ground.
        grain: standard deviation of the paper's noise, in levels.
        blur: strength: standard deviation in pixels.
        rescale: strength: factor by which the picture is scaled down, and up again.
        noise: strength: standard deviation in levels, of every colour by itself.
        turn: strength: rise of a horizontal line, per pixel, up or down.
        tilt: strength: perspective; how much closer one edge of the picture is than its middle, as a share.
        jpeg_quality: of the file.
    """

    size: tuple[int, int] = (13, 19)
    first_typeface: bool = False
    place_step: int = 1
    paper: tuple[int, int] = (255, 255)
    ink: tuple[int, int] = (0, 0)
    light_on_dark: float = 0.0
    contrast: int = 80
    gradient: Chance = NEVER
    photograph: Chance = NEVER
    grain: tuple[float, float] = (0.0, 0.0)
    blur: Chance = NEVER
    rescale: Chance = NEVER
    noise: Chance = NEVER
    turn: Chance = NEVER
    tilt: Chance = NEVER
    jpeg_quality: tuple[int, int] = (90, 90)

    def __post_init__(self) -> None:
        reach = max(self.paper[1] - self.ink[0], self.ink[1] - self.paper[0])
        if reach < self.contrast:
            raise DataError(
                f"contrast = {self.contrast} cannot be had with paper = {self.paper} and ink = {self.ink}, which are "
                f"at most {reach} grey levels apart; widen a range or lower the contrast"
            )
        for name in ("size", "paper", "ink", "grain", "jpeg_quality"):
            low, high = getattr(self, name)
            least, most = _BOUNDS[name]
            if not least <= low <= high <= most:
                raise DataError(
                    f"{name} = ({low}, {high}) is no range within {least} to {most}; give the lower end first"
                )


_BOUNDS = {
    "size": (4, 512),
    "paper": (0, _HIGHEST_LEVEL),
    "ink": (0, _HIGHEST_LEVEL),
    "grain": (0, 64),
    "jpeg_quality": (1, 95),
}

_COLOURED = Look(paper=(170, 255), ink=(0, 89), light_on_dark=1 / 3, grain=(0.0, 6.0))

LOOKS = {
    "fixed": Look(size=(16, 16), first_typeface=True, place_step=0),
    "aligned": Look(place_step=14),
    "anywhere": Look(),
    "coloured": _COLOURED,
    "degraded": dataclasses.replace(
        _COLOURED,
        paper=(100, 255),
        ink=(0, 160),
        gradient=Chance(0.3, 20.0, 90.0),
        photograph=Chance(0.4, 0.3, 1.0),
        blur=Chance(0.4, 0.3, 0.8),
        rescale=Chance(0.2, 0.55, 0.9),
        noise=Chance(0.4, 2.0, 10.0),
        turn=Chance(0.2, 0.01, 0.08),
        tilt=Chance(0.1, 0.02, 0.12),
        jpeg_quality=(35, 92),
    ),
}
"""Looks of scattered words by name, from easy to hard.

fixed: one typeface, size and place, black on white. aligned: all typefaces and sizes, the place a whole number of
patches of 14 pixels. anywhere: the place at any pixel. coloured: any colours, light on dark a third of the time, grain.
degraded: weaker contrast, gradients and photographs as grounds, blur, scaling, noise, turned and tilted a little, JPEG.
"""

PRINTED = Look(
    size=(18, 26),
    paper=(222, 255),
    ink=(0, 89),
    light_on_dark=0.2,
    contrast=120,
    grain=(0.0, 5.0),
    jpeg_quality=(92, 92),
)
"""Look of pages of running text: dark ink on light paper or, one time in five, light ink on dark paper."""


def draw_share(shares: Sequence[float], random: np.random.Generator) -> int:
    """Returns a place in `shares`, as often as its share says."""
    mark = random.random() * sum(shares)
    for place, share in enumerate(shares[:-1]):
        mark -= share
        if mark < 0:
            return place
    return len(shares) - 1
