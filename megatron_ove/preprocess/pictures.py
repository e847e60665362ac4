"""Reads any picture a user may have as RGB uint8, and writes JPEG for shards.

What a picture file can hold (rotation tags, CMYK, deep greys, palettes, transparency, animation, several sheets) is
settled here once, so that everything behind it sees [height, width, 3] uint8. A file that is no picture, or only part
of one, raises `DataError` with one sentence that says which and why. Only the formats of `file_kinds` are tried: Pillow
knows some that start other programs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import itertools
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from megatron_ove.errors import DataError
from megatron_ove.preprocess.file_kinds import (
    HEAD_BYTES,
    PICTURE_FORMATS,
    PICTURE_SUFFIXES,
    WEAKLY_MARKED,
    looks_like,
    unreadable_form,
)
from megatron_ove.preprocess.input_files import InputFile

MAX_PIXELS = 178_956_970  # Pillow's own warning limit: a quarter of 2 GiB at 3 bytes a pixel
_EXIF_ORIENTATION = 0x0112
_JPEG_START = b"\xff\xd8\xff"
_TIFF_SUFFIXES = (".tif", ".tiff")
_TIFF_STARTS = tuple(TiffImagePlugin.PREFIXES)
_MARK_BYTES = 4
_NEW_SUBFILE_TYPE, _REDUCED = 254, 1
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_DAMAGES = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, struct.error, OverflowError)
"""What Pillow raises when content is not as it should be."""
_LIGHT = 192  # grey level from which what is visible of a transparent picture would be lost on white


def load_picture(path: str | Path, sheet: int = 0, *, suffix: str | None = None) -> np.ndarray:
    """Reads a picture completely.

    Args:
        path: the file.
        sheet: which of a TIFF's pictures (see `sheets_of`).
        suffix: in lower case, of the name it was found by; None = that of `path`.

    Returns:
        [height, width, 3] uint8 RGB: EXIF rotation applied, CMYK converted, deep greys scaled to 8 bits, transparent
        parts on white (on black if what is visible is light), the first frame of an animation.

    Raises:
        DataError: the file is empty, no picture, of a form that is not read, truncated, or larger than `MAX_PIXELS`.
    """
    with _opened(Path(path)) as stream:
        return _decode(stream, name=str(path), sheet=sheet, suffix=suffix)


def decode_picture(content: bytes, *, name: str, sheet: int = 0) -> np.ndarray:
    """Decodes a picture file's `content`; `name` is used in error sentences. As `load_picture` otherwise."""
    return _decode(io.BytesIO(content), name=name, sheet=sheet)


def _decode(stream: BinaryIO, *, name: str, sheet: int, suffix: str | None = None) -> np.ndarray:
    head, size = stream.read(HEAD_BYTES), stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if not size:
        raise DataError(f"{name} is empty (0 bytes), so it is not a picture; remove it or copy it again")
    suffix = Path(name).suffix.lower() if suffix is None else suffix
    form = unreadable_form(head, suffix)
    if form:
        raise DataError(f"{name} {form}")
    try:
        with _without_warnings(), _open(stream, head, suffix) as picture:
            picture.seek(sheet)  # first, as each sheet has a size of its own
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{name} has {width} x {height} pixels, more than the limit of {MAX_PIXELS}; scale it down first"
                )
            picture.load()
            return np.ascontiguousarray(_to_rgb(ImageOps.exif_transpose(picture), is_png=picture.format == "PNG"))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        if looks_like(head, "picture") or suffix in WEAKLY_MARKED:
            raise DataError(_truncated(name, size, "its header is cut off")) from error
        raise DataError(
            f"{name} is not a picture: its content begins with {head[:12]!r}, which no picture format that is read "
            "here does, whatever the file is called; remove it or convert it to PNG"
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} has more pixels than the limit of {MAX_PIXELS}; scale it down first") from error
    except _DAMAGES as error:
        raise DataError(_truncated(name, size, str(error))) from error


def sheets_of(path: str | Path, *, suffix: str | None = None) -> tuple[int, ...]:
    """Returns the places of a file's pictures: (0,), or those of all sheets of a TIFF but reduced copies of others.

    Frames of an animation and previews of a phone's picture are no sheets. A damaged sheet is among them, and so is the
    one from which on a truncated file lacks the rest; reading it says what is wrong. `suffix` as for `load_picture`.
    """
    file = Path(path)
    suffix = file.suffix.lower() if suffix is None else suffix
    if (suffix in PICTURE_SUFFIXES and suffix not in _TIFF_SUFFIXES) or not file.is_file():
        return (0,)  # and opening a pipe would wait
    return _sheets(file)


def sheets_of_bytes(content: bytes) -> tuple[int, ...]:
    """As `sheets_of` for a picture file's `content`."""
    return _sheets(io.BytesIO(content)) if content.startswith(_TIFF_STARTS) else (0,)


def _sheets(file: Path | BinaryIO) -> tuple[int, ...]:
    sheets: list[int] = []
    with _without_warnings():
        try:
            with TiffImagePlugin.TiffImageFile(file) as picture:
                sheets += _sheet_numbers(picture)
        except _DAMAGES:
            pass
    return tuple(sheets) or (0,)


def _sheet_numbers(tiff: TiffImagePlugin.TiffImageFile) -> Iterator[int]:
    """Yields the places of an open TIFF's sheets one by one, as a damaged one must not hide those before it."""
    for sheet in itertools.count():
        try:
            tiff.seek(sheet)
            is_copy = int(tiff.tag_v2.get(_NEW_SUBFILE_TYPE, 0)) & _REDUCED
        except EOFError:
            return
        except _DAMAGES:
            yield sheet
            if tiff.tell() != sheet:  # where the next one begins is not known
                return
        else:
            if not is_copy:
                yield sheet


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps Pillow from warning of odd metadata, which changes no pixel; opening a picture may read some already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _opened(file: Path) -> BinaryIO:
    """Opens a picture: a TIFF where it lies, as only one sheet of it is wanted; any other file is read at once."""
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise DataError(f"{file} is a pipe, a socket or a device, not a file; name a picture's file")
        with ExitStack() as stack:
            stream = stack.enter_context(file.open("rb"))
            if not stream.peek(_MARK_BYTES).startswith(_TIFF_STARTS):
                return io.BytesIO(stream.read())
            stack.pop_all()
            return stream
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check the path and its permissions") from error


def _open(stream: BinaryIO, head: bytes, suffix: str) -> Image.Image:
    if head.startswith(_TIFF_STARTS):  # Image.open would refuse every sheet for the size of the first one
        return TiffImagePlugin.TiffImageFile(stream)
    _register_heif()
    formats = (*PICTURE_FORMATS, *({"HEIF"} & set(Image.OPEN)))
    formats += (WEAKLY_MARKED[suffix],) if suffix in WEAKLY_MARKED else ()
    return Image.open(stream, formats=formats)


@functools.lru_cache(maxsize=1)
def _register_heif() -> None:
    """Teaches Pillow HEIC pictures if the package for that is installed."""
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()


def _truncated(name: str, size: int, detail: str) -> str:
    return (
        f"{name} is a truncated or damaged picture ({size} bytes; decoder: {detail}), so part of it is missing; "
        "copy it again or remove it"
    )


def _to_rgb(picture: Image.Image, *, is_png: bool) -> np.ndarray:
    """Converts any Pillow mode to [height, width, 3] uint8 without clipping deep greys."""
    mode = picture.mode
    if mode == "F" or mode.startswith("I"):  # "I;16", "I;16B", "I": Pillow's own conversion would clip at 255
        grey = np.asarray(picture)
        levels = _float_levels(grey) if mode == "F" else _integer_levels(grey.astype(np.int64), is_png=is_png)
        return np.repeat(levels[..., None], 3, axis=-1)
    if picture.has_transparency_data:
        with_alpha = picture.convert("RGBA")
        canvas = Image.new("RGB", picture.size, _ground(np.asarray(with_alpha)))
        canvas.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return np.asarray(canvas)
    return np.asarray(picture.convert("RGB"))


def _integer_levels(grey: np.ndarray, *, is_png: bool) -> np.ndarray:
    """Scales [height, width] int64 to 0..255 by the depth that holds them, as scanners store 8 to 14 bits in 16 or 32.

    A PNG's 16 bits are all meant.
    """
    largest = int(grey.max(initial=0))
    depth = 16 if is_png else next((bits for bits in (8, 10, 12, 14, 16) if largest < 2**bits), None)
    white = largest if depth is None else 2**depth - 1
    return (np.clip(grey, 0, white) * 255 // white).astype(np.uint8)


def _float_levels(grey: np.ndarray) -> np.ndarray:
    """Scales [height, width] float32 to 0..255: from 0..1 by convention, from 0..255, or from what the largest is."""
    finite = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
    largest = float(finite.max(initial=0.0))
    white = 1.0 if largest <= 1.0 else 255.0 if largest <= 255.0 else largest
    return (np.clip(finite / white, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _ground(pixels: np.ndarray) -> tuple[int, int, int]:
    """Returns what to put under [height, width, 4] uint8 RGBA: white, or black if what is visible is nearly white."""
    weight = pixels[..., 3].astype(np.float32)
    luma = pixels[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    total = float(weight.sum(dtype=np.float64))
    light = total > 0 and float((luma * weight).sum(dtype=np.float64)) / total >= _LIGHT
    return _BLACK if light and weight.min() < 255 else _WHITE


@dataclass(frozen=True)
class PreparedPicture:
    """A picture as it is stored.

    Attributes:
        jpeg: the file.
        original: (height, width) in pixels before it was scaled, upright.
        stored: (height, width) of `jpeg`.
    """

    jpeg: bytes
    original: tuple[int, int]
    stored: tuple[int, int]


class JpegPreparer:
    """Any picture -> the bytes of an RGB or grey JPEG that fits a shard.

    A JPEG that already is one, upright and small enough, is passed on byte by byte, so it loses nothing.
    """

    def __init__(self, *, longest_side: int, quality: int) -> None:
        """`longest_side` in pixels; larger pictures are scaled down."""
        self._longest_side, self._quality = longest_side, quality

    def __call__(self, file: InputFile) -> bytes:
        """Raises `DataError` when the file is no usable picture."""
        return self.prepare_file(file).jpeg

    def prepare_file(self, file: InputFile) -> PreparedPicture:
        """Returns the JPEG with its sizes; raises `DataError` when the file is no usable picture."""
        with _opened(file.path) as stream:
            return self._prepare(stream, name=str(file.path), sheet=file.sheet, suffix=file.suffix)

    def prepare_bytes(self, content: bytes, *, name: str, sheet: int = 0) -> PreparedPicture:
        """As `prepare_file` of a picture file's `content`; `name` is used in error sentences."""
        return self._prepare(io.BytesIO(content), name=name, sheet=sheet, suffix=None)

    def _prepare(self, stream: BinaryIO, *, name: str, sheet: int, suffix: str | None) -> PreparedPicture:
        # Decoded in any case, which proves that it can be, to its end.
        picture = _decode(stream, name=name, sheet=sheet, suffix=suffix)
        size = picture.shape[0], picture.shape[1]
        content = stream.getvalue() if isinstance(stream, io.BytesIO) else b""
        if content.startswith(_JPEG_START):
            with _without_warnings(), Image.open(io.BytesIO(content), formats=("JPEG",)) as original:
                is_plain = original.format == "JPEG" and original.mode in ("RGB", "L")
                is_upright = original.getexif().get(_EXIF_ORIENTATION, 1) == 1
            if is_plain and is_upright and max(size) <= self._longest_side:
                return PreparedPicture(content, size, size)
        fitting = fit_longest_side(picture, self._longest_side)
        jpeg = encode_jpeg(fitting, quality=self._quality)
        return PreparedPicture(jpeg, size, (fitting.shape[0], fitting.shape[1]))


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
