"""A page -> its lines of text: found in tiles, cut out of the page at full size, read one by one."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from megatron_ove.preprocess.ocr.lines import TextLine
from megatron_ove.preprocess.ocr.tiles import FindLines, find_lines

ReadLine = Callable[[np.ndarray], tuple[str, float]]
"""[height, width, 3] uint8 RGB of one horizontal line -> its text and the score, 0..1; "" for nothing."""

_READING_HEIGHT = 64  # pixels; the models read at 48, and would scale large letters down without smoothing
_MAX_SIDE = 32_000  # pixels; OpenCV warps no picture of 32,767
_VERTICAL = 1.5  # a box this much higher than wide is a line from top to bottom


def read_page(picture: np.ndarray, find: FindLines, read: ReadLine, *, side: int) -> list[TextLine]:
    """Reads a page of any size.

    Args:
        picture: [height, width, 3] uint8 RGB.
        find: finds lines in a picture of at most `side` pixels a side.
        read: reads one line.
        side: bounds the memory of `find`.

    Returns:
        The lines with any text, from top to bottom, with their boxes in the picture's pixels.
    """
    lines = []
    for box in find_lines(picture, find, side=side):
        text, score = read(cut_line(picture, box))
        if text.strip():
            lines.append(TextLine(text, score, tuple((float(x), float(y)) for x, y in box)))
    return lines


def cut_line(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Cuts a line out of a page.

    Args:
        picture: [height, width, 3] uint8 RGB.
        box: [4, 2] corners (x, y), clockwise from the line's top left.

    Returns:
        [height, width, 3] uint8 RGB, upright, at most 64 pixels high and 32,000 wide; text from top to bottom is turned
        to the left.
    """
    width = max(1, round(float(max(np.linalg.norm(box[1] - box[0]), np.linalg.norm(box[2] - box[3])))))
    height = max(1, round(float(max(np.linalg.norm(box[3] - box[0]), np.linalg.norm(box[2] - box[1])))))
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    # From the part around the box only: what is left of a large page costs nothing.
    left, top = np.maximum(np.floor(box.min(0)).astype(int) - 1, 0)
    right, bottom = np.ceil(box.max(0)).astype(int) + 2
    part, corners = np.ascontiguousarray(picture[top:bottom, left:right]), box - np.array([left, top])
    scale = _MAX_SIDE / max(width, height, *part.shape[:2])
    if scale < 1.0:
        size = (max(1, int(part.shape[1] * scale)), max(1, int(part.shape[0] * scale)))
        return cut_line(cv2.resize(part, size, interpolation=cv2.INTER_AREA), corners * scale)
    transform = cv2.getPerspectiveTransform(corners.astype(np.float32), target)
    line = cv2.warpPerspective(part, transform, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    if height >= _VERTICAL * width:
        line = np.rot90(line)
    if line.shape[0] > _READING_HEIGHT:
        size = (max(1, round(line.shape[1] * _READING_HEIGHT / line.shape[0])), _READING_HEIGHT)
        line = cv2.resize(np.ascontiguousarray(line), size, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(line)
