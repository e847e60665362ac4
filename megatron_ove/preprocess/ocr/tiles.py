"""Finding the lines of a page of any size: in tiles, at the scale at which its smallest text is high enough.

The models that find lines see nothing below six pixels and mix up lines below eight. A page is looked at as a whole
first, but at no less than a third of its size; if its lines turn out too low, or none is seen, it is looked at again at
twice the scale, until they are high enough or the page's own size is reached. What is larger than the model's view is
looked at in tiles that overlap. What they found is joined by its place on the page, before anything is read: a line
that a tile's edge cuts is whole in the tile beside it or in the union of both parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import cv2
import numpy as np

FindLines = Callable[[np.ndarray], np.ndarray]
"""[height, width, 3] uint8 RGB -> [n, 4, 2] float32 corners (x, y) of its lines."""

MIN_LINE_HEIGHT = 12.5  # pixels of a box, which text of eight pixels has; lower lines are looked at again more closely
_LEAST_SCALE = 1 / 3  # of the first look: text of 18 pixels and more is never too low to be seen at all
_LEAST_SIDE = 64  # pixels; a strip with one line is filled up to this with its ground
_OVERLAP = 96  # pixels of two neighbouring tiles: more than three lines of MIN_LINE_HEIGHT at twice the scale
_LONGEST_SHAPE = 1.5  # a page longer than this times its width is looked at as several pages
_LOW_SHARE = 0.02  # of the page's letters
_SAME_LINE = 0.5  # of the lower box's height
_LONG_PART, _HIGH_PART = 0.5, 0.8  # of the longest part of a line, and of the highest one that is long
_COVERED = 0.5  # of a box


def find_lines(picture: np.ndarray, find: FindLines, *, side: int) -> np.ndarray:
    """Finds the lines of a page.

    Args:
        picture: [height, width, 3] uint8 RGB.
        find: the model; it is given pictures of at most `side` pixels a side.
        side: bounds the memory, whatever the size of the page.

    Returns:
        [n, 4, 2] float32 corners (x, y) in the picture's pixels, clockwise from a line's top left, in reading order.
    """
    height, width = picture.shape[:2]
    scale = max(side / min(max(height, width), _LONGEST_SHAPE * min(height, width)), _LEAST_SCALE)
    scale = min(scale, 1.0)
    found = np.zeros((0, 4, 2), np.float32)
    while True:
        closer = _look(picture, find, side=side, scale=scale)
        found = _with_larger(closer, found, (height, width))
        # Where nothing is seen the text may be too low to be seen at all.
        if scale >= 1.0 or (len(found) > 0 and not _has_low_lines(closer, scale)):
            return _in_reading_order(found)
        scale = min(1.0, 2.0 * scale)


def _look(picture: np.ndarray, find: FindLines, *, side: int, scale: float) -> np.ndarray:
    """Looks at the whole page once, tile by tile."""
    height, width = picture.shape[:2]
    boxes, tiles = [np.zeros((0, 4, 2), np.float32)], [np.zeros(0, np.int64)]
    size, overlap = side / scale, min(_OVERLAP, side // 4) / scale  # in the picture's pixels
    spans = itertools.product(_spans(height, size, overlap), _spans(width, size, overlap))
    for number, ((top, bottom), (left, right)) in enumerate(spans):
        part = picture[top:bottom, left:right]
        if scale < 1.0:
            shape = (max(1, round(part.shape[1] * scale)), max(1, round(part.shape[0] * scale)))
            factors = np.array([part.shape[1] / shape[0], part.shape[0] / shape[1]], np.float32)
            part = cv2.resize(part, shape, interpolation=cv2.INTER_AREA)
        else:
            factors = np.ones(2, np.float32)
        lines = find(_filled_up(part)).reshape(-1, 4, 2) * factors + np.array([left, top], np.float32)
        lines = np.clip(lines, 0, np.array([width, height], np.float32))
        # Cut letters at a tile's edge make odd boxes; what lies there only, the next tile sees away from its own edge.
        low, high = lines.min(1), lines.max(1)
        keep = (high[:, 0] > left + overlap / 2) | (left == 0)
        keep &= (high[:, 1] > top + overlap / 2) | (top == 0)
        keep &= (low[:, 0] < right - overlap / 2) | (right == width)
        keep &= (low[:, 1] < bottom - overlap / 2) | (bottom == height)
        lines = lines[keep]
        boxes.append(lines.astype(np.float32))
        tiles.append(np.full(len(lines), number))
    return join_lines(np.concatenate(boxes), np.concatenate(tiles))


def _filled_up(part: np.ndarray) -> np.ndarray:
    """Returns a contiguous part, with ground around it below and to the right if it is a strip."""
    below, beside = (max(0, _LEAST_SIDE - length) for length in part.shape[:2])
    if not below and not beside:
        return np.ascontiguousarray(part)
    ground = np.median(part, axis=(0, 1)).tolist()
    return np.asarray(cv2.copyMakeBorder(part, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=ground))


def _spans(length: int, size: float, overlap: float) -> list[tuple[int, int]]:
    """Returns begin and end of as few tiles as cover `length`, all equally long, with at least that overlap."""
    if length <= round(size):
        return [(0, length)]
    count = int(np.ceil((length - overlap) / (size - overlap)))
    step = (length - overlap) / count
    return [(round(i * step), min(length, round(i * step + step + overlap))) for i in range(count)]


def join_lines(boxes: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Joins what several tiles saw of one line.

    Args:
        boxes: [n, 4, 2] float32 corners on the page.
        tiles: [n] int64 number of the tile that saw each.

    Returns:
        [m, 4, 2] float32, m <= n.
    """
    group = np.arange(len(boxes))
    low, high = boxes.min(1), boxes.max(1)
    for index in range(len(boxes)):
        meets = (low[:index] <= high[index]).all(1) & (high[:index] >= low[index]).all(1)
        for other in np.flatnonzero(meets & (tiles[:index] != tiles[index])):
            if group[other] != group[index] and _is_same_line(boxes[index], boxes[other]):
                group[group == group[other]] = group[index]
    members = [np.flatnonzero(group == number) for number in dict.fromkeys(group.tolist())]
    joined = [boxes[m[0]] if len(m) == 1 else _around(boxes[m]) for m in members]
    return np.stack(joined) if joined else boxes


def _is_same_line(first: np.ndarray, second: np.ndarray) -> bool:
    """Tells whether two boxes overlap along the longer one and lie in one row, at any slant."""
    a, b = sorted((first, second), key=lambda box: -_sides(box[None])[0].max())
    along, across = a[1] - a[0], a[3] - a[0]
    if np.linalg.norm(along) < np.linalg.norm(across):
        along, across = across, along
    direction = along / max(float(np.linalg.norm(along)), 1e-6)
    normal = np.array([-direction[1], direction[0]])
    overlaps, extents = [], []
    for axis in (direction, normal):
        x, y = a @ axis, b @ axis
        overlaps.append(min(x.max(), y.max()) - max(x.min(), y.min()))
        extents.append(min(np.ptp(x), np.ptp(y)))
    return bool(overlaps[0] > 0 and overlaps[1] >= _SAME_LINE * extents[1])


def _around(boxes: np.ndarray) -> np.ndarray:
    """Returns the corners of the rectangle around the parts [n, 4, 2] of one line, clockwise from the top left.

    Its slant and height are those of its long and high parts: what a tile's edge left of a line points anywhere.
    """
    lengths, heights = _sides(boxes).max(1), _sides(boxes).min(1)
    height = heights[lengths >= _LONG_PART * lengths.max()].max()
    is_whole = (lengths >= _LONG_PART * lengths.max()) & (heights >= _HIGH_PART * height)
    whole, lengths = boxes[is_whole], lengths[is_whole]
    is_flat = _sides(whole[lengths.argmax()][None])[0].argmax() == 0
    directions = whole[:, 1] - whole[:, 0] if is_flat else whole[:, 3] - whole[:, 0]
    angles = np.arctan2(directions[:, 1], directions[:, 0])
    order = angles.argsort()
    middle = np.searchsorted(lengths[order].cumsum(), lengths.sum() / 2)  # the slant that half of the line has
    x, y = np.cos(angles[order[middle]]), np.sin(angles[order[middle]])
    axes = np.array([[x, y], [-y, x]], np.float32)
    along, across = boxes.reshape(-1, 2) @ axes[0], whole @ axes[1]
    sides = np.quantile(across.min(1), 0.1), np.quantile(across.max(1), 0.9)
    corners = np.array([(u, v) for u in (along.min(), along.max()) for v in sides]) @ axes
    total, difference = corners.sum(1), corners[:, 0] - corners[:, 1]
    places = [total.argmin(), difference.argmax(), total.argmax(), difference.argmin()]
    return corners[places if len(set(places)) == 4 else [0, 2, 3, 1]].astype(np.float32)


def _sides(boxes: np.ndarray) -> np.ndarray:
    """Returns [n, 2]: length of the upper and of the left side of boxes [n, 4, 2]."""
    return np.stack(
        [np.linalg.norm(boxes[:, 1] - boxes[:, 0], axis=1), np.linalg.norm(boxes[:, 3] - boxes[:, 0], axis=1)], 1
    )


def _has_low_lines(boxes: np.ndarray, scale: float) -> bool:
    """Tells whether more than `_LOW_SHARE` of the letters (length / height of their line) are too low at this scale."""
    sides = _sides(boxes)
    heights, letters = sides.min(1), sides.max(1) / np.maximum(sides.min(1), 1.0)
    return bool(letters[heights * scale < MIN_LINE_HEIGHT].sum() > _LOW_SHARE * letters.sum())


def _with_larger(closer: np.ndarray, earlier: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Adds to the boxes of a closer look what an earlier one saw as a whole and the closer one did not: large letters.

    A box of the earlier look that is less than half covered is one; what lies inside it are parts of its letters.
    """
    factor = min(1.0, 1024 / max(shape))
    size = (int(shape[0] * factor) + 1, int(shape[1] * factor) + 1)
    covered, inside = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    cv2.fillPoly(covered, list(np.round(closer * factor).astype(np.int32)), 1)
    larger = []
    for index, box in enumerate(np.round(earlier * factor).astype(np.int32)):
        (left, top), (right, bottom) = np.maximum(box.min(0), 0), np.maximum(box.max(0), 0) + 1
        whole = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillConvexPoly(whole, box - np.array([left, top], np.int32), 1)
        part = covered[top:bottom, left:right]
        if part[whole[: part.shape[0], : part.shape[1]] > 0].mean() < _COVERED:
            larger.append(index)
            cv2.fillConvexPoly(inside, box, 1)
    centers = np.clip(np.round(closer.mean(1) * factor).astype(int), 0, np.array(size[::-1]) - 1)
    return np.concatenate([closer[inside[centers[:, 1], centers[:, 0]] == 0], earlier[larger]])


def _in_reading_order(boxes: np.ndarray) -> np.ndarray:
    """Sorts boxes by row and then from left to right; a row reaches half a line below the top of its first line."""
    if len(boxes) == 0:
        return boxes
    boxes = boxes[np.argsort(boxes[:, 0, 1], kind="stable")]
    heights = _sides(boxes).min(1)
    rows, row_end = np.zeros(len(boxes), np.int64), -np.inf
    for index, top in enumerate(boxes[:, 0, 1]):
        rows[index] = rows[index - 1] + (top > row_end) if index else 0
        if index == 0 or rows[index] != rows[index - 1]:
            row_end = top + heights[index] / 2
    return boxes[np.lexsort((boxes[:, 0, 0], rows))]
