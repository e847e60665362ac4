"""Any clip -> the frames of a uniform time grid.

A clip is what a player would show of it (`clip_reading`), and the grid is even in time (`clip_times`). swscale
converts to 8-bit RGB, so 10-bit and full-range clips come out right. A clip with fewer frames than places, or with a
frame that is shown for long, repeats frames; the repeats are marked, so that the selection never takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import av.error
import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.codec.clip_reading import Packets, ShownFrames, open_clip, read_packets
from megatron_ove.preprocess.codec.clip_times import Timeline
from megatron_ove.preprocess.codec.settings import CodecSettings

_GREY = 128
_COMPLETE_SHARE = 0.9  # fewer packets than this part of those announced means that the file is cut off
# Less than half says more about the damage than about the clip. Not just half, as field pairs are two packets a frame.
_SHOWN_SHARE = 0.45


@dataclass(frozen=True)
class ClipFrames:
    """The frames of one clip on the time grid.

    Attributes:
        frames: [num_frames, frame_height, frame_width, 3] uint8 RGB.
        source_indices: [num_frames] int32 ascending, which of the clip's shown frames each one is.
        is_duplicate: [num_frames] bool, True where the frame repeats the one before it.
        content_box: (top, left, height, width) of the picture inside a frame; smaller than the frame if letterboxed.
        num_source_frames: frames that a player shows of the clip.
        codec: name of its video codec.
        spoilt_packets: packets that could not be decoded and were passed over.
    """

    frames: np.ndarray
    source_indices: np.ndarray
    is_duplicate: np.ndarray
    content_box: tuple[int, int, int, int]
    num_source_frames: int
    codec: str
    spoilt_packets: int


@dataclass(frozen=True)
class _Decoded:
    """One pass over the frames of a clip: what was kept, {index: (frame, content box)}, and what was seen."""

    kept: dict[int, tuple[np.ndarray, tuple[int, int, int, int]]]
    timeline: Timeline
    spoilt: int
    codec: str


def read_clip(path: str | Path, settings: CodecSettings) -> ClipFrames:
    """Reads `settings.num_frames` frames, evenly spaced in time from the first to the last, of the first video stream.

    Frames that the file hides, or that nothing can be shown of, are left out as players leave them out.

    Raises:
        DataError: no media file, no video stream, no decodable frame, a truncated file, or one that is damaged so much
            that less than half of its frames are left.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file} does not exist; check the path")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty (0 bytes), so it is not a clip; remove it or copy it again")
    try:
        packets = read_packets(file)
        if packets.count < packets.announced * _COMPLETE_SHARE:
            raise DataError(
                f"{file} is truncated: it announces {packets.announced} frames but holds only {packets.count}; copy it "
                "again or cut it properly"
            )
        # The packets' times tell which frames will be wanted, so that one pass over the frames is enough for a clip
        # in which every packet gives one frame.
        decoded = _decode(file, packets.timeline.grid(settings.num_frames), packets.lead, settings)
        _check_shown(file, packets, decoded)
        wanted = decoded.timeline.grid(settings.num_frames)
        if not decoded.kept.keys() >= set(wanted.tolist()):
            decoded = _decode(file, wanted, packets.lead, settings)
    except av.error.FFmpegError as error:
        raise DataError(
            f"{file} cannot be decoded as a clip (FFmpeg: {error.strerror}): it is truncated, damaged or no video; "
            "copy it again or remove it"
        ) from error
    if not decoded.kept.keys() >= set(wanted.tolist()):
        raise DataError(f"{file} changed while it was read; start again when it is written to its end")
    return ClipFrames(
        frames=np.stack([decoded.kept[index][0] for index in wanted.tolist()]),
        source_indices=wanted,
        is_duplicate=np.concatenate([[False], wanted[1:] == wanted[:-1]]),
        content_box=decoded.kept[int(wanted[0])][1],
        num_source_frames=len(decoded.timeline.ticks),
        codec=decoded.codec,
        spoilt_packets=decoded.spoilt,
    )


def _check_shown(file: Path, packets: Packets, decoded: _Decoded) -> None:
    """Raises `DataError` if far less can be shown than the container says, or than its packets should give."""
    shown = len(decoded.timeline.ticks)
    expected = packets.announced or shown + decoded.spoilt
    if shown < expected * _SHOWN_SHARE:
        raise DataError(
            f"{file} is damaged: only {shown} of its {expected} frames can be decoded ({decoded.spoilt} packets are "
            "spoilt); copy it again or remove it"
        )


def _decode(file: Path, wanted: np.ndarray, lead: int, settings: CodecSettings) -> _Decoded:
    """Decodes the clip behind its lead and keeps the wanted frames; raises `DataError` if there is no frame at all."""
    needed = set(wanted.tolist())
    kept: dict[int, tuple[np.ndarray, tuple[int, int, int, int]]] = {}
    with open_clip(file) as (container, stream):
        stream.codec_context.thread_count = 1  # clips are spread over processes
        aspect = float(stream.codec_context.sample_aspect_ratio or 1)
        codec = stream.codec_context.name
        shown = ShownFrames(container, stream, lead)
        for index, frame in enumerate(shown):
            if index in needed:
                kept[index] = fit_frame(frame, settings, pixel_aspect=aspect)
        timeline = shown.timeline()
    if not timeline.ticks:
        reason = f" (FFmpeg: {shown.error.strerror})" if shown.error else ""
        raise DataError(
            f"{file} has a video stream ({codec}), but no frame of it can be decoded{reason}; it is damaged, or of a "
            "kind that this FFmpeg cannot decode: copy it again, convert it or remove it"
        )
    return _Decoded(kept, timeline, shown.spoilt, codec)


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
