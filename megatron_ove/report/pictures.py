"""Pictures for the page: drawings on arrays, and files turned into data URIs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_MIME_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
TAGGED, UNTAGGED = (20, 120, 90), (150, 150, 150)


def data_uri(path: Path) -> str:
    """Returns the file at `path` as a data URI, so that the page needs no other file."""
    return content_uri(path.read_bytes(), _MIME_TYPES[path.suffix.lower()])


def content_uri(content: bytes, mime_type: str) -> str:
    """Returns the content of a file as a data URI."""
    return f"data:{mime_type};base64,{base64.b64encode(content).decode('ascii')}"


def is_picture_name(path: Path) -> bool:
    """Returns whether a file is called like a picture that a page can show."""
    return path.suffix.lower() in _MIME_TYPES


def picture_size(path: Path) -> tuple[int, int]:
    """Returns (width, height) in pixels without decoding."""
    with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as picture:
        return picture.size


def save_jpeg(picture: np.ndarray, path: Path, *, longest_side: int | None = None, quality: int = 85) -> Path:
    """Writes [height, width, 3] uint8 RGB as JPEG, scaled down to `longest_side` if given; returns `path`."""
    image = Image.fromarray(picture)
    if longest_side and max(image.size) > longest_side:
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=quality)
    return path


def draw_boxes(page: np.ndarray, boxes: Sequence[np.ndarray], is_tagged: Sequence[bool]) -> np.ndarray:
    """Outlines text lines on a page.

    Args:
        page: [height, width, 3] uint8 RGB.
        boxes: corner points [4, 2] (x, y) in pixels, one array per line.
        is_tagged: per line, whether it gave at least one tag (strong colour) or none (grey).

    Returns:
        A copy with the boxes drawn, tinted inside.
    """
    base = Image.fromarray(page).convert("RGBA")
    layer = Image.new("RGBA", base.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    width = max(2, round(max(base.size) / 450))
    for box, tagged in zip(boxes, is_tagged, strict=True):
        color = TAGGED if tagged else UNTAGGED
        points = [(float(x), float(y)) for x, y in box]
        draw.polygon(points, fill=(*color, 26))
        draw.line([*points, points[0]], fill=(*color, 255), width=width, joint="curve")
    return np.asarray(Image.alpha_composite(base, layer).convert("RGB"))


def tile(frames: Sequence[np.ndarray], columns: int, gap: int = 3) -> np.ndarray:
    """Lays pictures [height, width, 3] uint8 of one size out row by row on white."""
    height, width = frames[0].shape[:2]
    rows = -(-len(frames) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet
