"""Small synthetic clips for tests: frames and encoded files of many kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def textured_background(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random texture, [height, width, 3] uint8, that motion search can follow."""
    import cv2

    noise = np.random.default_rng(seed).normal(0, 1, (height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3.0)
    return np.clip(128 + smooth / smooth.std() * 40, 0, 255).astype(np.uint8)


def moving_square(num_frames: int, size: int = 112, side: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """A textured square that moves over a still background; returns frames and its top-left (y, x) per frame."""
    frames = np.repeat(textured_background(size, size)[None], num_frames, axis=0)
    square = textured_background(side, side, seed=9)[..., ::-1] // 2 + np.array([120, 0, 0], np.uint8)
    places = np.stack(
        [(10 + np.arange(num_frames)) % (size - side), (5 + 2 * np.arange(num_frames)) % (size - side)], 1
    )
    for frame, (top, left) in zip(frames, places, strict=True):
        frame[top : top + side, left : left + side] = square
    return frames, places


def panning_camera(num_frames: int, size: int = 112, side: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """A camera that pans by one pixel a frame while one object keeps its place on the screen's diagonal path."""
    world = textured_background(size, size + num_frames, seed=3)
    frames = np.stack([world[:, t : t + size] for t in range(num_frames)])
    square = textured_background(side, side, seed=9)
    places = np.stack([(np.arange(num_frames) * 2) % (size - side), np.full(num_frames, 40)], 1)
    for frame, (top, left) in zip(frames, places, strict=True):
        frame[top : top + side, left : left + side] = square
    return frames, places


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    full_range: bool = False,
    times_ms: Sequence[int] | None = None,
) -> Path:
    """Encodes [t, height, width, 3] uint8 RGB, at 25 frames per second or shown at `times_ms`."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.options = options or {}
        if full_range:
            stream.codec_context.color_range = 2
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times_ms is not None:
                picture.pts, picture.time_base = times_ms[i], Fraction(1, 1000)
            if full_range:
                picture = picture.reformat(format=pixel_format, dst_color_range=2)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def remux(
    source: Path,
    target: Path,
    change: Callable[[int, av.Packet], av.Packet | None],
    *,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Copies the packets of a clip without encoding them again; `change` gets number and packet, None leaves it out."""
    with av.open(str(source)) as read, av.open(str(target), "w", options=container_options or {}) as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        packets = (packet for packet in read.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            changed = change(number, packet)
            if changed is not None:
                changed.stream = stream
                written.mux(changed)
    return target


def write_sound(path: Path) -> Path:
    """Writes a media file that holds sound only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for start in range(0, 16000, 1024):
            samples = np.sin(np.arange(start, start + 1024) / 20).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
