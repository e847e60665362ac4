"""DALI decoding of pictures on CPU or GPU: whole, or a window of each, resized and mirrored as told per sample.

DALI draws nothing itself: windows, sizes and mirroring are inputs, so that a step depends on the run's seed only. The
same code serves both devices; on a GPU the decoder is the hybrid one ("mixed") and pictures stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline
from torch import Tensor

from megatron_ove.data.windows import Windows
from megatron_ove.errors import DataError

_MAX_PICTURES = 64
"""Pictures decoded in one go."""
_MAX_PIXELS = 1 << 26
"""Pixels decoded in one go (192 MiB), unless a single picture has more."""


class PictureDecoder:
    """A DALI pipeline fed with encoded pictures. Not for use by several threads at once."""

    def __init__(self, *, device: torch.device, num_threads: int, resizes: bool) -> None:
        """Prepares decoding; the pipeline is built at the first picture, in the thread that decodes.

        Args:
            device: where pictures are decoded and returned.
            num_threads: CPU threads.
            resizes: whether pictures are cut, resized and mirrored (`Windows` are given) or only decoded.
        """
        self._device = device
        self._num_threads = num_threads
        self._resizes = resizes
        self._pipeline: Pipeline | None = None

    def decode(
        self,
        pixels: np.ndarray,
        read: Callable[[int], bytes],
        describe: Callable[[int], str],
        reject: Callable[[int, str], None],
        windows: Windows | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Decodes n pictures, a few at a time.

        Args:
            pixels: [n] pixels of each encoded picture; bounds memory.
            read: returns the encoded bytes of picture i.
            describe: returns what messages call picture i.
            reject: called with (i, a sentence) for a picture that cannot be read or decoded; it is left out.
            windows: what to make of each picture; None = decode only.

        Yields:
            (i, [height, width, 3] uint8 RGB on the device). The pixels are overwritten when the iterator advances.
        """
        for start, stop in _chunks(pixels):
            encoded: dict[int, np.ndarray] = {}
            for i in range(start, stop):
                try:
                    encoded[i] = np.frombuffer(read(i), np.uint8)
                except DataError as error:
                    reject(i, str(error))
            for part, pictures in self._run_what_works(encoded, windows, describe, reject):
                for place, i in enumerate(part):
                    yield i, torch.from_dlpack(pictures[place])
                if self._device.type == "cuda":
                    # the next run may write to the memory that was just read
                    torch.cuda.current_stream().synchronize()

    def _run_what_works(
        self,
        encoded: dict[int, np.ndarray],
        windows: Windows | None,
        describe: Callable[[int], str],
        reject: Callable[[int, str], None],
    ) -> Iterator[tuple[list[int], Any]]:
        """Yields (picture numbers, their pictures): all at once, or one by one where some of them cannot be decoded,
        because DALI does not say which."""
        if not encoded:
            return
        numbers = list(encoded)
        try:
            pictures = self._run([encoded[i] for i in numbers], windows, numbers)
        except RuntimeError as error:
            self._pipeline = None  # a pipeline cannot be used after an error
            if not _may_be_a_picture(error):
                raise
            failure = error
        else:
            yield numbers, pictures
            return
        is_explained = False
        for i in numbers:
            try:
                pictures = self._run([encoded[i]], windows, [i])
            except RuntimeError as error:
                self._pipeline = None
                if not _may_be_a_picture(error):
                    raise
                is_explained = True
                reject(
                    i,
                    f"{describe(i)} cannot be decoded, although it could when its shard was written, so the shard is "
                    "damaged; check it with tools/shards/validate_shards.py --deep and copy it again",
                )
            else:
                yield [i], pictures
        if not is_explained:  # not a picture's fault: for instance too little memory for all of them
            raise failure

    def _run(self, encoded: list[np.ndarray], windows: Windows | None, numbers: list[int]) -> Any:
        if self._pipeline is None:
            self._pipeline = _build_pipeline(self._device, self._num_threads, self._resizes)
        pipeline: Pipeline = self._pipeline
        pipeline.feed_input("encoded", encoded)
        if windows is not None:
            pipeline.feed_input("corner", list(windows.corner[numbers].astype(np.int32)))
            pipeline.feed_input("extent", list(windows.extent[numbers].astype(np.int32)))
            pipeline.feed_input("size", list(windows.size[numbers].astype(np.float32)))
            pipeline.feed_input("mirror", [np.array(m, np.int32) for m in windows.mirror[numbers]])
        (pictures,) = pipeline.run()
        return pictures


def _may_be_a_picture(error: RuntimeError) -> bool:
    """Whether a damaged picture can be the cause of an error of DALI; not what would hit any picture."""
    text = str(error).lower()
    return not any(sign in text for sign in ("out of memory", "memory allocation", "bad_alloc", "cuda runtime"))


def _chunks(pixels: np.ndarray) -> Iterator[tuple[int, int]]:
    start, total = 0, 0
    for i, count in enumerate(pixels.tolist()):
        if i > start and (i - start == _MAX_PICTURES or total + count > _MAX_PIXELS):
            yield start, i
            start, total = i, 0
        total += count
    if len(pixels) > start:
        yield start, len(pixels)


def _build_pipeline(device: torch.device, num_threads: int, resizes: bool) -> Pipeline:
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=_MAX_PICTURES,
        num_threads=num_threads,
        device_id=device.index or 0 if on_gpu else None,
        prefetch_queue_depth=1,
        exec_async=False,  # whole steps are prefetched by the loader; a second queue would only hold memory
        exec_pipelined=False,
    )
    decoder = "mixed" if on_gpu else "cpu"
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        if resizes:
            corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
            extent = fn.external_source(name="extent", dtype=types.INT32, ndim=1)
            size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            picture = fn.decoders.image_slice(
                encoded,
                corner,
                extent,
                axes=[0, 1],
                normalized_anchor=False,
                normalized_shape=False,
                device=decoder,
                output_type=types.RGB,
            )
            picture = fn.resize(picture, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            picture = fn.flip(picture, horizontal=mirror)  # pyright: ignore[reportCallIssue, reportArgumentType]
        else:
            picture = fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
        pipeline.set_outputs(picture)
    pipeline.build()
    return pipeline
