"""Colours and grounds: plain paper, gradients, crops of photographs; the ink keeps its contrast to every point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_ove.preprocess.photographs import load_photograph, photograph_names
from megatron_ove.preprocess.text_render.looks import Look

_TRIES = 100
_GREY = np.array(
    (77, 150, 29), np.int64
)  # of 256: how bright red, green and blue look; whole numbers, the same anywhere
_SMALLEST_CROP = 0.15  # of the photograph's sides


@dataclass(frozen=True)
class Colours:
    """[3] levels of the paper, and [num_inks, 3] of the inks."""

    paper: np.ndarray
    inks: np.ndarray


def grey_levels(colours: np.ndarray) -> np.ndarray:
    """Returns how bright [..., 3] colours look, as [...] levels 0 to 255."""
    return (colours * _GREY).sum(axis=-1) / 256.0  # no product of matrices: its rounding differs between processors


def draw_colours(look: Look, random: np.random.Generator, *, num_inks: int) -> Colours:
    """Draws paper and inks with the look's contrast; all inks lie on the same side of the paper."""
    is_light_on_dark = look.light_on_dark > 0 and random.random() < look.light_on_dark
    for _ in range(_TRIES):
        paper = random.integers(look.paper[0], look.paper[1] + 1, 3)
        inks = random.integers(look.ink[0], look.ink[1] + 1, (num_inks, 3))
        differences = grey_levels(inks) - grey_levels(paper)
        if (np.abs(differences) >= look.contrast).all() and np.ptp(np.sign(differences)) == 0:
            break
    else:  # the ends of the ranges, of which Look makes sure
        ends = (look.paper[1], look.ink[0]), (look.paper[0], look.ink[1])
        of_paper, of_ink = max(ends, key=lambda pair: abs(pair[0] - pair[1]))
        paper, inks = np.full(3, of_paper), np.full((num_inks, 3), of_ink)
    if is_light_on_dark:  # inverted, which keeps every difference
        paper, inks = 255 - paper, 255 - inks
    return Colours(paper, inks)


def draw_ground(look: Look, colours: Colours, random: np.random.Generator, *, width: int, height: int) -> np.ndarray:
    """Draws the ground: the paper, perhaps with a gradient or a photograph, and its grain.

    Returns:
        [height, width, 3] float64 levels 0 to 255; without the grain, no point is closer to an ink than the contrast.
    """
    ground = np.broadcast_to(colours.paper.astype(np.float64), (height, width, 3))
    span, share = look.gradient.draw(random), look.photograph.draw(random)
    if span is not None:
        ground = ground + _gradient(random, width, height) * span
    if share is not None:
        ground = ground + _photograph(random, width, height) * share
    if span is not None or share is not None:
        ground = _with_contrast(np.clip(ground, 0, 255), colours, look.contrast)
    grain = random.uniform(*look.grain)
    if grain > 0:
        ground = np.clip(ground + random.normal(0.0, grain, (height, width, 1)), 0, 255)
    return ground


def _gradient(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns [height, width, 3] from -0.5 at one side to 0.5 at the other in a drawn direction, tinted."""
    across, down = random.uniform(-1, 1, 2)
    ramp = np.linspace(-across, across, width)[None, :] + np.linspace(-down, down, height)[:, None]
    return (ramp / (2 * max(abs(across) + abs(down), 1e-6)))[..., None] * random.uniform(0.5, 1.0, 3)


def _photograph(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns a crop of a photograph as [height, width, 3] levels less their mean."""
    names = photograph_names()
    picture = load_photograph(names[int(random.integers(len(names)))])
    scale = min(picture.shape[0] / height, picture.shape[1] / width) * random.uniform(_SMALLEST_CROP, 1.0)
    crop_width, crop_height = max(1, int(width * scale)), max(1, int(height * scale))
    left = int(random.integers(picture.shape[1] - crop_width + 1))
    top = int(random.integers(picture.shape[0] - crop_height + 1))
    crop = Image.fromarray(picture[top : top + crop_height, left : left + crop_width])
    levels = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR), np.float64)
    return levels - levels.mean(axis=(0, 1))


def _with_contrast(ground: np.ndarray, colours: Colours, contrast: int) -> np.ndarray:
    """Draws the ground towards the plain paper as far as the contrast to every ink needs.

    Grey levels are linear in the mixture and the paper has the contrast, so one division gives the share to keep.
    """
    of_paper, of_ground = grey_levels(colours.paper), grey_levels(ground)
    darkest, lightest = of_ground.min(), of_ground.max()
    keep = 1.0
    for of_ink in grey_levels(colours.inks):
        room = abs(of_paper - of_ink) - contrast
        towards = of_paper - darkest if of_ink < of_paper else lightest - of_paper
        if towards > room:
            keep = min(keep, max(room, 0.0) / towards)
    return colours.paper + (ground - colours.paper) * keep
