"""Decodes a picture with the decoder that training uses, before it is allowed into a shard.

One undecodable picture ends a DALI pipeline, and with it a training run, so the check belongs where shards are
written. Formats on which CPU and GPU decoders differ (CMYK, alpha, 16 bit) are refused too: re-encode those first.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline
from PIL import Image

from megatron_ove.errors import DataError

MAX_PICTURE_PIXELS = 64 * 1024 * 1024
"""Largest accepted picture: 192 MiB decoded. An A4 page at 600 dpi has half of it."""
_FORMATS = ("JPEG", "PNG", "WEBP")
_KNOWN_FORMATS = (*_FORMATS, "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What Pillow may try (its JPEG includes MPO): some of its other formats start another program."""
_BATCH = 72


class UnusablePictureError(DataError):
    """A picture that must not enter a shard; the text is the reason alone, `index` its place in the call."""

    def __init__(self, reason: str, index: int) -> None:
        super().__init__(reason)
        self.index = index


class PictureChecker:
    """Decodes pictures on the CPU through DALI and measures them."""

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None

    def measure(self, pictures: Sequence[bytes]) -> list[tuple[int, int]]:
        """Decodes every picture.

        Args:
            pictures: encoded pictures.

        Returns:
            (height, width) in pixels of each, after the EXIF orientation has been applied.

        Raises:
            UnusablePictureError: for the first picture that cannot be used.
        """
        for index, picture in enumerate(pictures):
            reason = _header_problem(picture)
            if reason:
                raise UnusablePictureError(reason, index)
        sizes: list[tuple[int, int]] = []
        for start in range(0, len(pictures), _BATCH):
            sizes += self._decode(pictures[start : start + _BATCH], start)
        return sizes

    def _decode(self, pictures: Sequence[bytes], start: int) -> list[tuple[int, int]]:
        pipeline = self._pipeline = self._pipeline or _build_pipeline()
        try:
            pipeline.feed_input("encoded", [np.frombuffer(picture, np.uint8) for picture in pictures])
            (decoded,) = pipeline.run()
        except RuntimeError as error:
            self._pipeline = None  # DALI cannot go on after a failed sample; a new pipeline takes 2 ms
            if len(pictures) == 1:
                raise UnusablePictureError(
                    "it cannot be decoded to its end (truncated or damaged); get the original file again", start
                ) from error
            return [size for offset, one in enumerate(pictures) for size in self._decode([one], start + offset)]
        return [(shape[0], shape[1]) for shape in decoded.shape()]


def _build_pipeline() -> Pipeline:
    pipeline = Pipeline(
        batch_size=_BATCH,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    pipeline.build()
    return pipeline


def _header_problem(picture: bytes) -> str | None:
    """Returns why a picture of this format, colour model or size is refused, or None; reads the header only."""
    if not picture:
        return "it is empty (0 bytes)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size has its own sentence below
            image = Image.open(io.BytesIO(picture), formats=_KNOWN_FORMATS)
    except Image.DecompressionBombError:
        return f"it has more than {MAX_PICTURE_PIXELS} pixels; scale it down"
    except Exception:  # Pillow raises many kinds of errors for what is no picture
        return "it is not a picture (no known format); check what the file really is"
    width, height = image.size
    if image.format not in (*_FORMATS, "MPO"):
        return f"its format {image.format} is not one of {', '.join(_FORMATS)}; re-encode it as JPEG"
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # a phone's JPEG carries a preview behind it
        return f"it is an animation of {image.n_frames} frames; re-encode one frame as JPEG"
    if image.format == "PNG" and picture[24] == 16:  # IHDR bit depth: signature 8 + length 4 + type 4 + size 8
        return "it has 16 bits per channel; re-encode it with 8"
    if image.mode == "CMYK":
        return "its colours are CMYK, which decoders convert differently; re-encode it as RGB"
    if image.has_transparency_data:
        return "it has an alpha channel, under which colours are arbitrary; flatten it onto a background"
    if width * height > MAX_PICTURE_PIXELS:
        return f"it has {width} x {height} pixels, more than {MAX_PICTURE_PIXELS}; scale it down"
    return None
