"""Any clip -> the frames of a uniform time grid.

Frames are counted by reading packets, because containers may not store the number or store a wrong one. swscale
converts to 8-bit RGB, so 10-bit and full-range clips come out right. A clip shorter than the grid repeats frames; the
repeats are marked, so that the selection never takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import av.error
import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.codec.settings import CodecSettings

_GREY = 128
_COMPLETE_SHARE = 0.9  # fewer decoded frames than this part of those announced means that the file is cut off


@dataclass(frozen=True)
class ClipFrames:
    """The frames of one clip on the time grid.

    Attributes:
        frames: [num_frames, frame_height, frame_width, 3] uint8 RGB.
        source_indices: [num_frames] int32, which frame of the clip each one is.
        is_duplicate: [num_frames] bool, True where the frame repeats the one before it.
        content_box: (top, left, height, width) of the picture inside a frame; smaller than the frame if letterboxed.
        num_source_frames: frames the clip has.
        codec: name of its video codec.
    """

    frames: np.ndarray
    source_indices: np.ndarray
    is_duplicate: np.ndarray
    content_box: tuple[int, int, int, int]
    num_source_frames: int
    codec: str


def read_clip(path: str | Path, settings: CodecSettings) -> ClipFrames:
    """Reads `settings.num_frames` frames, evenly spaced from the first to the last, of the first video stream.

    Raises:
        DataError: no media file, no video stream, no decodable frame, or a truncated file.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file} does not exist; check the path")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty (0 bytes), so it is not a clip; remove it or copy it again")
    try:
        num_packets, announced = _count_frames(file)
        wanted = _grid_indices(num_packets, settings.num_frames)
        decoded, num_decoded, codec = _decode(file, wanted, settings)
        if num_decoded < max(announced, num_packets) * _COMPLETE_SHARE:
            raise DataError(
                f"{file} is truncated: it announces {max(announced, num_packets)} frames but only {num_decoded} can be "
                "decoded; copy it again or cut it properly"
            )
        if num_decoded < num_packets:  # packets without a frame of their own (field pairs, lead-in): spread again
            wanted = _grid_indices(num_decoded, settings.num_frames)
            decoded, _, codec = _decode(file, wanted, settings)
    except av.error.FFmpegError as error:
        raise DataError(
            f"{file} cannot be decoded as a clip (FFmpeg: {error.strerror}): it is truncated, damaged or no video; "
            "copy it again or remove it"
        ) from error
    box = decoded[int(wanted[0])][1]
    return ClipFrames(
        frames=np.stack([decoded[int(index)][0] for index in wanted]),
        source_indices=wanted,
        is_duplicate=np.concatenate([[False], wanted[1:] == wanted[:-1]]),
        content_box=box,
        num_source_frames=num_decoded if num_decoded < num_packets else num_packets,
        codec=codec,
    )


def _grid_indices(num_source_frames: int, num_frames: int) -> np.ndarray:
    return np.round(np.linspace(0, num_source_frames - 1, num_frames)).astype(np.int32)


def _video_stream(container: av.container.InputContainer, file: Path) -> av.VideoStream:
    # A cover picture of a music file is a video stream to FFmpeg, but not a clip.
    streams = [
        stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise DataError(f"{file} has no video stream (it holds {kinds}), so there are no frames to read; remove it")
    return streams[0]


def _count_frames(file: Path) -> tuple[int, int]:
    """Returns (packets with data, frames announced by the container or 0)."""
    with av.open(str(file)) as container:
        stream = _video_stream(container, file)
        count, last_end = 0, 0.0
        for packet in container.demux(stream):
            if packet.size:
                count += 1
                if packet.pts is not None and packet.time_base is not None:
                    last_end = max(last_end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        announced = stream.frames
        if not announced and len(container.streams) == 1 and container.duration and last_end > 0:
            # No frame count (Matroska): compare the time reached with the duration in the header.
            announced = round(count * container.duration / av.time_base / last_end)
    if count == 0:
        raise DataError(f"{file} has a video stream without a single frame; it is truncated or was never finished")
    return count, announced


def _decode(
    file: Path, wanted: np.ndarray, settings: CodecSettings
) -> tuple[dict[int, tuple[np.ndarray, tuple[int, int, int, int]]], int, str]:
    """Decodes up to the last wanted frame. Returns {index: (frame, content box)}, frames decoded, codec name."""
    needed = set(wanted.tolist())
    last_wanted = int(wanted[-1])
    kept: dict[int, tuple[np.ndarray, tuple[int, int, int, int]]] = {}
    count = 0
    with av.open(str(file)) as container:
        stream = _video_stream(container, file)
        stream.codec_context.thread_count = 1  # clips are spread over processes
        aspect = float(stream.codec_context.sample_aspect_ratio or 1)
        codec = stream.codec_context.name
        try:
            for frame in container.decode(stream):
                if count in needed:
                    kept[count] = fit_frame(frame, settings, pixel_aspect=aspect)
                count += 1
                if count > last_wanted:
                    break
        except av.error.FFmpegError:
            if count == 0:
                raise  # otherwise the number of frames decoded says how much is missing
    if not kept:
        raise DataError(f"{file} has a video stream ({codec}), but no frame of it can be decoded; it is damaged")
    return kept, count, codec


def fit_frame(
    frame: av.VideoFrame, settings: CodecSettings, *, pixel_aspect: float = 1.0
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Scales one decoded frame onto the grid frame.

    Returns:
        [frame_height, frame_width, 3] uint8 RGB, and the content box (top, left, height, width).
    """
    quarter_turns = round(frame.rotation / 90) % 4 if frame.rotation else 0
    goal_height, goal_width = settings.frame_height, settings.frame_width
    if quarter_turns % 2:
        goal_height, goal_width = goal_width, goal_height
    source_height, source_width = frame.height, frame.width * pixel_aspect
    choose = max if settings.fit == "crop" else min
    scale = choose(goal_height / source_height, goal_width / source_width)
    height, width = max(1, round(source_height * scale)), max(1, round(source_width * scale))
    method = "AREA" if scale < 1 else "BICUBIC"
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=method)
    if settings.fit == "crop":
        top, left = (height - goal_height) // 2, (width - goal_width) // 2
        fitted, box = pixels[top : top + goal_height, left : left + goal_width], (0, 0, goal_height, goal_width)
    else:
        top, left = (goal_height - height) // 2, (goal_width - width) // 2
        fitted = np.full((goal_height, goal_width, 3), _GREY, np.uint8)
        fitted[top : top + height, left : left + width] = pixels
        box = (top, left, height, width)
    if quarter_turns:
        mask = np.zeros(fitted.shape[:2], bool)
        mask[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = True
        fitted, mask = np.rot90(fitted, quarter_turns), np.rot90(mask, quarter_turns)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(rows[0]), int(columns[0]), len(rows), len(columns))
    return np.ascontiguousarray(fitted), box
