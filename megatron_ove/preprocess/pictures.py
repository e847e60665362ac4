"""Reads any picture a user may have as RGB uint8, and writes JPEG for shards.

What a picture file can hold (rotation tags, CMYK, 16 bits, palettes, transparency, animation) is settled here once, so
that everything behind it sees [height, width, 3] uint8. A file that is no picture, or only part of one, raises
`DataError` with one sentence that says which and why.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_ove.errors import DataError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 178_956_970  # Pillow's own warning limit: a quarter of 2 GiB at 3 bytes a pixel
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_EXIF_ORIENTATION = 0x0112
_WHITE = (255, 255, 255)


def load_picture(path: str | Path) -> np.ndarray:
    """Reads the picture at `path` completely.

    Returns:
        [height, width, 3] uint8 RGB: EXIF rotation applied, CMYK converted, 16 bits scaled to 8, transparent parts on
        white, the first frame of an animation.

    Raises:
        DataError: the file is empty, no picture, truncated, or larger than `MAX_PIXELS`.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check the path and its permissions") from error
    return decode_picture(content, name=str(file))


def decode_picture(content: bytes, *, name: str) -> np.ndarray:
    """Decodes a picture file's `content`; `name` is used in error sentences. As `load_picture` otherwise."""
    if not content:
        raise DataError(f"{name} is empty (0 bytes), so it is not a picture; remove it or copy it again")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{name} has {width} x {height} pixels, more than the limit of {MAX_PIXELS}; scale it down first"
                )
            picture.seek(0)
            picture.load()
            return np.ascontiguousarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        if content.startswith(_SIGNATURES) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP"):
            raise DataError(_truncated(name, len(content), "its header is cut off")) from error
        raise DataError(
            f"{name} is not a picture: its content begins with {content[:12]!r}, which no picture format does, "
            "whatever the file is called; remove it"
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} has more pixels than the limit of {MAX_PIXELS}; scale it down first") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise DataError(_truncated(name, len(content), str(error))) from error


def _truncated(name: str, size: int, detail: str) -> str:
    return (
        f"{name} is a truncated or damaged picture ({size} bytes; decoder: {detail}), so part of it is missing; "
        "copy it again or remove it"
    )


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """Converts any Pillow mode to [height, width, 3] uint8 without clipping deep greys."""
    mode = picture.mode
    if mode.startswith("I"):  # "I;16", "I;16B", "I": 16-bit greys, where Pillow's own conversion would clip at 255
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        return np.repeat((grey // 257).astype(np.uint8)[..., None], 3, axis=-1)
    if mode == "F":  # float greys: 0..1 by convention
        grey = np.nan_to_num(np.asarray(picture, dtype=np.float32))
        return np.repeat((np.clip(grey, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)[..., None], 3, axis=-1)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        with_alpha = picture.convert("RGBA")
        canvas = Image.new("RGB", picture.size, _WHITE)
        canvas.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return np.asarray(canvas)
    return np.asarray(picture.convert("RGB"))


class JpegPreparer:
    """Path of any picture -> the bytes of an RGB or grey JPEG that fits a shard.

    A JPEG that already is one, upright and small enough, is passed on byte by byte, so it loses nothing.
    """

    def __init__(self, *, longest_side: int, quality: int) -> None:
        """`longest_side` in pixels; larger pictures are scaled down."""
        self._longest_side, self._quality = longest_side, quality

    def __call__(self, path: Path) -> bytes:
        """Raises `DataError` when the file is no usable picture."""
        picture = load_picture(path)  # also proves that the file decodes to its end
        with Image.open(path) as original:
            is_plain = original.format == "JPEG" and original.mode in ("RGB", "L")
            is_upright = original.getexif().get(_EXIF_ORIENTATION, 1) == 1
        if is_plain and is_upright and max(picture.shape[:2]) <= self._longest_side:
            return path.read_bytes()
        return encode_jpeg(fit_longest_side(picture, self._longest_side), quality=self._quality)


def encode_jpeg(picture: np.ndarray, *, quality: int = 92, full_chroma: bool = False) -> bytes:
    """Encodes [height, width, 3] uint8 RGB as JPEG; `full_chroma` keeps colour at full resolution (4:4:4)."""
    stream = io.BytesIO()
    Image.fromarray(picture, "RGB").save(stream, "JPEG", quality=quality, subsampling=0 if full_chroma else 2)
    return stream.getvalue()


def fit_longest_side(picture: np.ndarray, longest_side: int) -> np.ndarray:
    """Scales [height, width, 3] uint8 down, aspect kept, so that no side exceeds `longest_side`; never enlarges."""
    height, width = picture.shape[:2]
    scale = longest_side / max(height, width)
    if scale >= 1.0:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture, "RGB").resize(size, Image.Resampling.LANCZOS))
