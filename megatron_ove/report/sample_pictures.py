"""Stored pictures as they are shown on a page: small, with the patches that matter lit."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from megatron_ove.errors import DataError
from megatron_ove.report.pictures import content_uri

_FORMATS = ("JPEG", "PNG", "WEBP")
_GREY = 96


def decode_small(data: bytes, size: tuple[int, int], longest_side: int) -> np.ndarray:
    """Decodes a stored picture, scaled down if it is larger.

    Args:
        data: the encoded picture.
        size: (height, width) in pixels that the index says, EXIF orientation applied.
        longest_side: pixels, at most.

    Returns:
        [height, width, 3] uint8 RGB.

    Raises:
        DataError: it is no such picture; the sentence goes behind the picture's name.
    """
    height, width = size
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            warnings.simplefilter("ignore")
            found = image.size
            # Nothing is decoded before the size is known to be what was checked when the sample was written.
            if found in ((width, height), (height, width)):
                image.draft("RGB", _within(found, longest_side))
                upright = ImageOps.exif_transpose(image).convert("RGB")
                if (upright.width < upright.height) == (width < height) or min(upright.size) == max(upright.size):
                    return np.asarray(upright.resize(_within((width, height), longest_side), Image.Resampling.LANCZOS))
                found = (height, width)
    except Exception as error:  # Pillow raises errors of many kinds for damaged pictures
        raise DataError("cannot be decoded, so the shard is damaged; copy it again") from error
    raise DataError(
        f"has {found[0]} x {found[1]} pixels, but the index says {width} x {height}; copy index and shards again"
    )


def light(picture: np.ndarray, lit: np.ndarray, extent: tuple[float, float], *, strength: float) -> np.ndarray:
    """Dims what lies in patches that are not lit.

    Args:
        picture: [height, width, 3] uint8, at any scale.
        lit: [rows, columns] bool.
        extent: patches that the picture is high and wide; fewer than rows and columns where its last ones are cut.
        strength: 0 = not dimmed, 1 = grey.

    Returns:
        A picture of the same shape.
    """
    rows, columns = (
        np.minimum(((np.arange(pixels) + 0.5) * patches / pixels).astype(np.int64), most - 1)
        for pixels, patches, most in zip(picture.shape, extent, lit.shape, strict=False)
    )
    dimmed = (picture * (1 - strength) + _GREY * strength).astype(np.uint8)
    return np.where(lit[rows[:, None], columns][..., None], picture, dimmed)


def jpeg_uri(picture: np.ndarray) -> str:
    """Returns [height, width, 3] uint8 RGB as the data URI of a JPEG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=82)
    return content_uri(stream.getvalue(), "image/jpeg")


def _within(size: tuple[int, int], longest_side: int) -> tuple[int, int]:
    factor = min(1.0, longest_side / max(size))
    width, height = (max(1, round(side * factor)) for side in size)
    return width, height
