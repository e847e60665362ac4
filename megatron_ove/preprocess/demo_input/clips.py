"""Moving scenes from photographs: a camera that pans, zooms and turns, and objects with a motion of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np

from megatron_ove.preprocess.photographs import load_photograph, photograph_names

_SIZES = ((160, 160), (192, 144), (144, 192), (208, 160))  # (width, height)
_RATE = 25
# Both make a later cut of a scene look unlike an earlier one, so that a picture's mean colours do not give it away.
_DRIFT = 0.3
"""Farthest way of the camera over a scene, as a part of the photograph's sides."""
_EXPOSURE = 0.2
"""Largest change of brightness, and of each colour's share, up or down."""
VideoCodec = Literal["libx264", "libx265"]


@dataclass(frozen=True)
class _MovingObject:
    """A round cut-out on an elliptical path; lengths are parts of the frame's shorter side."""

    picture: np.ndarray
    mask: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    turns: float
    phase: float

    def draw(self, frame: np.ndarray, progress: float) -> None:
        """Draws the object onto `frame` in place; `progress` is 0..1 of the scene."""
        height, width = frame.shape[:2]
        side = self.picture.shape[0]
        angle = 2 * np.pi * (self.turns * progress + self.phase)
        place = self.centre + self.radius * np.array([np.cos(angle), np.sin(angle)])
        left = int(np.clip(place[0] * width - side / 2, 0, width - side))
        top = int(np.clip(place[1] * height - side / 2, 0, height - side))
        window = frame[top : top + side, left : left + side]
        np.copyto(window, self.picture, where=self.mask)


def draw_scene(index: int, random: np.random.Generator, *, num_frames: int) -> Iterator[np.ndarray]:
    """Draws the frames of scene `index`; its background photograph follows from the index.

    Yields:
        [height, width, 3] uint8 RGB, all of one even size.
    """
    names = photograph_names()
    background = load_photograph(names[index % len(names)])
    width, height = _SIZES[int(random.integers(len(_SIZES)))]
    others = [name for name in names if name != names[index % len(names)]]
    objects = [_draw_object(others, random, min(width, height)) for _ in range(int(random.integers(1, 3)))]
    heading = random.uniform(0.0, 2 * np.pi)
    drift = _DRIFT * random.uniform(0.6, 1.0) * np.array([np.cos(heading), np.sin(heading)])
    start = 0.5 - drift / 2 + random.uniform(-0.08, 0.08, 2)
    zoom_start, zoom_end = random.uniform(0.4, 0.75, 2)
    exposure_start, exposure_end = _draw_exposure(random), _draw_exposure(random)
    turn = random.uniform(-6.0, 6.0)  # degrees over the whole scene
    for number in range(num_frames):
        progress = number / max(num_frames - 1, 1)
        zoom = zoom_start + (zoom_end - zoom_start) * progress
        frame = _look(background, start + drift * progress, zoom, turn * progress, width, height)
        for item in objects:
            item.draw(frame, progress)
        exposure = exposure_start + (exposure_end - exposure_start) * progress
        yield np.clip(frame * exposure, 0, 255).astype(np.uint8)


def _draw_exposure(random: np.random.Generator) -> np.ndarray:
    """Returns [3] factors of red, green and blue: brightness and white balance."""
    low, high = 1 - _EXPOSURE, 1 + _EXPOSURE
    return random.uniform(low, high) * random.uniform(low, high, 3)


def _draw_object(names: list[str], random: np.random.Generator, shorter: int) -> _MovingObject:
    photograph = load_photograph(names[int(random.integers(len(names)))])
    side = int(shorter * random.uniform(0.22, 0.35))
    edge = int(min(photograph.shape[:2]) * 0.5)
    top, left = (int(random.integers(size - edge + 1)) for size in photograph.shape[:2])
    cut = photograph[top : top + edge, left : left + edge]
    row, column = np.mgrid[0:side, 0:side] - (side - 1) / 2
    return _MovingObject(
        picture=cv2.resize(cut, (side, side), interpolation=cv2.INTER_AREA),
        mask=(np.hypot(row, column) <= side / 2)[..., None],
        centre=random.uniform(0.35, 0.65, 2),
        radius=random.uniform(0.15, 0.35, 2),
        turns=float(random.choice([-1, 1]) * random.uniform(1.0, 3.0)),
        phase=float(random.random()),
    )


def _look(background: np.ndarray, centre: np.ndarray, zoom: float, angle: float, width: int, height: int) -> np.ndarray:
    """Cuts a turned window out of the photograph: `zoom` is the part of its shorter side that is seen."""
    scale = min(width, height) / (zoom * min(background.shape[:2]))
    matrix = cv2.getRotationMatrix2D((background.shape[1] * centre[0], background.shape[0] * centre[1]), angle, scale)
    matrix[:, 2] += np.array([width / 2, height / 2]) - np.array(
        [background.shape[1] * centre[0], background.shape[0] * centre[1]]
    )
    return cv2.warpAffine(background, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def write_clip(path: Path, frames: list[np.ndarray], codec: VideoCodec) -> None:
    """Encodes frames [height, width, 3] uint8 RGB into an MP4 file; one thread, so that the bits are the same."""
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(_RATE))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "24", "threads": "1"}
        if codec == "libx264":
            # With mbtree and B frames x264 gives different bits from run to run, even on one thread.
            stream.options |= {"preset": "veryfast", "x264-params": "mbtree=0"}
        else:
            stream.options |= {"preset": "ultrafast", "x265-params": "log-level=error:pools=none:frame-threads=1"}
            stream.codec_context.codec_tag = "hvc1"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
