"""Turning and tilting of ink together with its ground truth.

Every glyph is moved by itself, so that after it the maps still say exactly which glyph inked which pixel.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

from megatron_ove.preprocess.text_render.canvas import Box, Canvas, joined_box
from megatron_ove.preprocess.text_render.looks import Look

_RIM = 2  # empty pixels around a glyph, so that its soft edge is not cut
_CORNERS = np.array([[0, 1, 0, 1], [0, 0, 1, 1]])


def draw_movement(look: Look, canvas: Canvas, random: np.random.Generator) -> np.ndarray | None:
    """Draws a turn or tilt under which all ink stays on the canvas; None for neither.

    Returns:
        [3, 3] float64: takes (x, y, 1) of a point of the canvas to its new place, up to a factor.
    """
    rise, tilt = look.turn.draw(random), look.tilt.draw(random)
    if rise is None and tilt is None:
        return None
    rise, tilt = (rise or 0.0) * random.choice((-1, 1)), tilt or 0.0
    across, down = random.uniform(-tilt, tilt, 2)
    half_width, half_height = canvas.width / 2, canvas.height / 2
    length = math.sqrt(1 + rise * rise)
    to_middle = np.array([[1, 0, -half_width], [0, 1, -half_height], [0, 0, 1.0]])
    turned = np.array([[1 / length, -rise / length, 0], [rise / length, 1 / length, 0], [0, 0, 1.0]])
    tilted = np.array([[1, 0, 0], [0, 1, 0], [across / half_width, down / half_height, 1.0]])
    moved = _product(tilted, turned, to_middle)
    # Smaller where ink would leave the canvas.
    x, y = np.abs(_move(moved, joined_box(canvas.glyphs)))
    shrink = min(1.0, (half_width - 1) / x.max(), (half_height - 1) / y.max())
    back = np.array([[shrink, 0, half_width], [0, shrink, half_height], [0, 0, 1.0]])
    return _product(back, moved)


def move_canvas(canvas: Canvas, movement: np.ndarray) -> Canvas:
    """Returns a canvas with everything moved by a `movement` of `draw_movement`: ink, maps and boxes."""
    moved = Canvas(canvas.width, canvas.height)
    inverse = _inverse(movement)
    total = np.zeros((canvas.height, canvas.width), np.int32)
    most = np.zeros_like(moved.coverage)
    for number, glyph in enumerate(canvas.glyphs):
        left, top, right, bottom = glyph.box
        own = np.s_[top:bottom, left:right]
        ink = np.where(canvas.glyph_map[own] == number, canvas.coverage[own], 0).astype(np.uint8)
        x, y = _move(movement, glyph.box)
        target = (
            *(max(0, math.floor(x.min()) - 1), max(0, math.floor(y.min()) - 1)),
            *(min(canvas.width, math.ceil(x.max()) + 1), min(canvas.height, math.ceil(y.max()) + 1)),
        )
        new = _resample(np.pad(ink, _RIM), inverse, (left - _RIM, top - _RIM), target)
        place = np.s_[target[1] : target[3], target[0] : target[2]]
        total[place] += new
        is_more = new > most[place]
        np.copyto(moved.glyph_map[place], number, where=is_more)
        np.copyto(most[place], new, where=is_more)
        moved.glyphs.append(dataclasses.replace(glyph, box=_tight(new, target)))
    # Parts of ink that touch each other have soft edges now, which together cover what the whole would.
    moved.coverage = np.minimum(total, 255).astype(np.uint8)
    moved.inks = list(canvas.inks)
    for word in canvas.words:
        moved.mark_word(word.text, word.first, word.stop)
    for line in canvas.lines:
        moved.mark_line(line.text, line.first, line.stop)
    if canvas.rules.any():
        moved.rules = _resample(canvas.rules, inverse, (0, 0), (0, 0, canvas.width, canvas.height))
    return moved


def _move(movement: np.ndarray, box: Box) -> np.ndarray:
    """Returns [2, 4] x and y of a box's corners after a movement."""
    left, top, right, bottom = box
    corners = np.array([[left], [top]]) + _CORNERS * np.array([[right - left], [bottom - top]])
    x, y, scale = _product(movement, np.vstack([corners, np.ones(4)]))
    return np.stack([x / scale, y / scale])


def _resample(pixels: np.ndarray, inverse: np.ndarray, corner: tuple[int, int], target: Box) -> np.ndarray:
    """Returns [height, width] of `target` from pixels whose array's corner lies at `corner` of the canvas."""
    shift_in = np.array([[1, 0, -corner[0]], [0, 1, -corner[1]], [0, 0, 1.0]])
    shift_out = np.array([[1, 0, target[0]], [0, 1, target[1]], [0, 0, 1.0]])
    matrix = _product(shift_in, inverse, shift_out)
    coefficients = (matrix / matrix[2, 2]).ravel()[:8].tolist()
    size = (target[2] - target[0], target[3] - target[1])
    image = Image.fromarray(pixels).transform(
        size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR
    )
    return np.asarray(image)


def _product(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Multiplies matrices without BLAS, whose rounding differs from processor to processor."""
    for other in others:
        first = (first[:, :, None] * other[None]).sum(axis=1)
    return first


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverts [3, 3] up to a factor by its adjugate, for the same reason without LAPACK."""
    first, second, third = matrix
    return np.stack([np.cross(second, third), np.cross(third, first), np.cross(first, second)], axis=1)


def _tight(coverage: np.ndarray, box: Box) -> Box:
    """Returns the box of the ink inside `box`; the middle pixel if a small glyph has left none."""
    columns, rows = np.flatnonzero(coverage.any(axis=0)), np.flatnonzero(coverage.any(axis=1))
    if not columns.size:
        x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
        return x, y, x + 1, y + 1
    left, top = box[0], box[1]
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1
