"""The packets of a clip and the frames that a player would show of it.

What cannot be read or decoded is counted and passed over, as players do. FFmpeg itself leaves out what a file hides:
the lead-in before an edit list, frames that only others refer to, and frames before the first that can be decoded
completely in a recording joined in the middle. Frames that a decoder calls damaged are used, as players show them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import av.error
import av.format
import av.index

from megatron_ove.errors import DataError
from megatron_ove.preprocess.codec.clip_times import Timeline

_MOST_GAPS = 1000  # places of a file that make no sense and are skipped; a bound, in case FFmpeg does not move on
_LONGEST_STEP_JOINED = 10  # seconds; FFmpeg's own limits for clocks that may start anew (MPEG-TS, MPEG-PS) and others
_LONGEST_STEP = 30 * 3600
# Decoders, all built on that of H.263, which show something grey and smeared for frames whose reference is missing.
# Others wait for a frame that is complete.
_STARTS_ON_NOTHING = frozenset(
    ("flv", "h263", "h263i", "h263p", "mpeg4", "msmpeg4", "msmpeg4v1", "msmpeg4v2", "rv10", "rv20", "wmv1", "wmv2")
)


_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,ogg,asf,flv,live_flv,mxf,gxf,dv,nut,yuv4mpegpipe,ivf,"
    "rm,wtv,bink,nsv,gif,mjpeg,h261,h263,h264,hevc,vc1,obu,av1,m4v,amv"
)
"""Containers and streams. Not among them: lists and playlists, which make FFmpeg open what else they name, whatever the
file is called."""
_REFUSED = 22


def open_container(file: Path) -> av.container.InputContainer:
    """Opens a media file by what it is, and nothing that it names.

    Raises:
        DataError: a format that is not read.
        av.error.FFmpegError: no media file.
    """
    # Absolute: of "concat:a.mp4" FFmpeg would take the beginning for a protocol.
    try:
        return av.open(str(file.absolute()), options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"})
    except av.error.ArgumentError as error:
        if error.errno != _REFUSED:
            raise
        raise DataError(
            f"{file} is of a format that is not read, such as a list that names other files; convert it to mp4"
        ) from error


@contextmanager
def open_clip(file: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a media file and chooses its first video stream.

    Raises:
        DataError: no video stream, one that no decoder is there for, or a format that is not read.
        av.error.FFmpegError: no media file.
    """
    with open_container(file) as container:
        # A cover picture of a music file is a video stream to FFmpeg, but not a clip.
        streams = [
            stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise DataError(f"{file} has no video stream (it holds {kinds}), so there are no frames to read; remove it")
        if streams[0].codec_context is None:
            raise DataError(f"{file} has a video stream that FFmpeg has no decoder for; convert it or remove it")
        yield container, streams[0]


@dataclass(frozen=True)
class Packets:
    """What the packets of a clip say before any is decoded.

    Attributes:
        count: packets with data, hidden ones left out.
        announced: how many of them the container says there are; 0 if it does not say.
        lead: packets before the first key frame that must not be decoded.
        timeline: the frames that are shown if every packet gives one.
    """

    count: int
    announced: int
    lead: int
    timeline: Timeline


def read_packets(file: Path) -> Packets:
    """Reads all packets without decoding them; raises as `open_clip`, and `DataError` if there is none."""
    clock, index, end = _Clock(), 0, 0.0
    key: int | None = None
    with open_clip(file) as (container, stream):
        entries = list(stream.index_entries)  # before reading, which makes them more in some formats
        for packet in _packets(container):
            if (pts := packet.dts if packet.pts is None else packet.pts) is not None:
                end = max(end, float((pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index:
                if key is None and packet.is_keyframe:
                    key = index
                index += 1
                if not packet.is_discard:
                    clock.add(packet.pts, packet.dts, packet.duration)
        if not len(clock):
            raise DataError(f"{file} has a video stream without a single frame; it is truncated or was never finished")
        timeline = clock.timeline(container, stream, sort=True)
        announced = _announced(container, stream, entries, len(clock), end)
        lead = key or 0 if stream.codec_context.name in _STARTS_ON_NOTHING else 0
    return Packets(len(clock), announced, lead, timeline)


class ShownFrames:
    """Iterates once over the frames of a clip in the order in which they are shown.

    Attributes:
        spoilt: packets that could not be decoded.
        error: why the last of them could not.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream, lead: int = 0) -> None:
        """`lead` packets at the start are passed over."""
        self._container, self._stream, self._lead = container, stream, lead
        self._clock = _Clock()
        self.spoilt = 0
        self.error: av.error.FFmpegError | None = None

    def __iter__(self) -> Iterator[av.VideoFrame]:
        for packet in itertools.islice(_packets(self._container, self._stream), self._lead, None):
            yield from self._decode(packet)
        yield from self._decode(None)  # what the decoder has held back

    def timeline(self) -> Timeline:
        """Returns the times of the frames that came."""
        return self._clock.timeline(self._container, self._stream)

    def _decode(self, packet: av.Packet[av.VideoStream] | None) -> list[av.VideoFrame]:
        try:
            frames = self._stream.codec_context.decode(packet)
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            if packet is not None:
                self.spoilt, self.error = self.spoilt + 1, error
            return []
        for frame in frames:
            self._clock.add(frame.pts, frame.dts, frame.duration)
        return frames


class _Clock:
    """Collects the times of packets or frames, in ticks of the stream."""

    def __init__(self) -> None:
        self._times: list[tuple[int | None, int | None, int]] = []

    def __len__(self) -> int:
        return len(self._times)

    def add(self, pts: int | None, dts: int | None, duration: int | None) -> None:
        self._times.append((pts, dts, duration or 0))

    def timeline(
        self, container: av.container.InputContainer, stream: av.VideoStream, *, sort: bool = False
    ) -> Timeline:
        """Returns the times, those of packets sorted into the order in which their frames are shown."""
        kind = 0 if any(time[0] is not None for time in self._times) else 1  # AVI tells the order of decoding only
        times = [(time[kind], time[2]) for time in self._times]
        if sort:
            times.sort(key=lambda time: -1 if time[0] is None else time[0])
        joined = container.format.flags & av.format.Flags.ts_discont.value
        longest = (_LONGEST_STEP_JOINED if joined else _LONGEST_STEP) / float(stream.time_base or 1)
        return Timeline([tick for tick, _ in times], times[-1][1] if times else 0, longest)


def _packets(container: av.container.InputContainer, *streams: av.VideoStream) -> Iterator[av.Packet[av.VideoStream]]:
    """Yields the packets with data of the streams, or of all; goes on behind places that make no sense."""
    for _ in range(_MOST_GAPS):
        try:
            # An empty packet would tell the decoder that the clip is over; AVI has them for frames left out.
            yield from (packet for packet in container.demux(*streams) if packet.size)
            return
        except av.error.InvalidDataError:
            continue


def _announced(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    entries: Sequence[av.index.IndexEntry],
    count: int,
    end: float,
) -> int:
    """Returns how many frames with data the container says there are, 0 if it does not say.

    `entries` is the index as it was before reading, `count` the packets read, and `end` the time in seconds that the
    packets of all streams reach.
    """
    formats = set(container.format.name.split(","))
    if stream.frames:
        # FFmpeg makes the index of an MP4 of its sample tables and edit list. That of an AVI names the frames with
        # data, unless it is cut off: then it holds the few frames that were looked at when the file was opened.
        indexed = "mov" in formats or count <= len(entries)
        return sum(entry.size > 0 and not entry.is_discard for entry in entries) if indexed else stream.frames
    # Other formats have no duration but one that FFmpeg estimates, or one that is often wrong (FLV).
    if formats & {"matroska", "mov", "mxf"} and container.duration and end > 0:
        return round(count * container.duration / av.time_base / end)
    return 0
