"""Clips of which a part is hidden, spoilt, missing or shown for longer than the rest: read as players show them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess.codec.clip_frames import ClipFrames, read_clip
from megatron_ove.preprocess.codec.clip_times import Timeline
from megatron_ove.preprocess.codec.settings import CodecSettings
from tests.support.clips import remux, write_video

_SMALL = CodecSettings(frame_height=56, frame_width=56, patch_budget=128)
_FAST = {"preset": "ultrafast", "g": "250", "sc_threshold": "0", "crf": "10"}


def _numbered(num_frames: int) -> np.ndarray:
    """Frames that show their number in eight bars, light for a one, that no codec can blur."""
    bits = (np.arange(num_frames)[:, None] >> np.arange(8)) & 1
    bars = np.repeat(60 + 140 * bits, 8, axis=1).astype(np.uint8)
    return np.broadcast_to(bars[:, None, :, None], (num_frames, 64, 64, 3))


def _shown(clip: ClipFrames) -> np.ndarray:
    """Returns which numbered frame is at each place of the grid."""
    bits = clip.frames[:, :, 3::7].mean(axis=(1, 3)) > 130
    return (bits << np.arange(8)).sum(axis=1)


def _even(first: int, last: int) -> np.ndarray:
    return np.round(np.linspace(first, last, 64)).astype(int)


def _spoilt(packet: av.Packet) -> av.Packet:
    spoilt = av.Packet(b"\xff" * packet.size)
    spoilt.pts, spoilt.dts, spoilt.duration, spoilt.time_base = (
        packet.pts,
        packet.dts,
        packet.duration,
        packet.time_base,
    )
    spoilt.is_keyframe = packet.is_keyframe
    return spoilt


def _shifted(seconds: float) -> Callable[[int, av.Packet], av.Packet]:
    def change(_: int, packet: av.Packet) -> av.Packet:
        ticks = round(seconds / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return packet

    return change


def _cut_without_encoding(folder: Path, b_frames: int) -> Path:
    """100 frames from one key frame; an edit list hides the first 40, as cutting without re-encoding makes it."""
    whole = write_video(folder / "whole.mp4", _numbered(100), options=_FAST | {"bf": str(b_frames)})
    return remux(whole, folder / "cut.mp4", _shifted(-1.6), container_options={"avoid_negative_ts": "disabled"})


@pytest.mark.parametrize("b_frames", [0, 2])
def test_what_an_edit_list_hides_is_no_part_of_the_clip(tmp_path: Path, b_frames: int) -> None:
    clip = read_clip(_cut_without_encoding(tmp_path, b_frames), _SMALL)
    assert clip.num_source_frames == 60
    np.testing.assert_array_equal(clip.source_indices, _even(0, 59))
    np.testing.assert_array_equal(_shown(clip), 40 + _even(0, 59))


def test_an_edit_list_may_hide_the_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", _numbered(100), options=_FAST | {"bf": "0"})
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 4 + 8  # version and flags, number of edits, then the first edit's duration
    duration = int.from_bytes(content[place : place + 4], "big")
    content[place : place + 4] = (duration // 2).to_bytes(4, "big")
    path.write_bytes(content)
    clip = read_clip(path, _SMALL)
    assert clip.num_source_frames == 50
    np.testing.assert_array_equal(_shown(clip), _even(0, 49))


def test_a_cut_clip_that_lacks_its_end_is_still_truncated(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3)).astype(np.uint8)
    whole = write_video(tmp_path / "whole.mp4", noise, options=_FAST)
    options = {"avoid_negative_ts": "disabled", "movflags": "faststart"}
    path = remux(whole, tmp_path / "cut.mp4", _shifted(-0.8), container_options=options)
    assert read_clip(path, _SMALL).num_source_frames == 50
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.8)])
    with pytest.raises(DataError, match=r"cut\.mp4 is truncated: it announces 50 frames but holds only 3\d; copy"):
        read_clip(path, _SMALL)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "avi"])
def test_a_truncated_clip_with_sound(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    random = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"} if suffix == "mp4" else {}) as container:
        video, sound = container.add_stream("mjpeg", rate=25), container.add_stream("pcm_s16le", rate=8000)
        video.width, video.height, video.pix_fmt = 64, 64, "yuvj420p"
        for i in range(70):
            noise = random.integers(0, 256, (64, 64, 3)).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), format="s16", layout="mono")
            samples.sample_rate, samples.pts = 8000, 320 * i
            container.mux(sound.encode(samples))
    assert read_clip(path, _SMALL).num_source_frames == 70
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.7)])
    with pytest.raises(DataError, match=r"is truncated: it announces 70 frames but holds only [45]\d;"):
        read_clip(path, _SMALL)


@pytest.mark.parametrize("suffix, codec", [("mp4", "mjpeg"), ("mkv", "mjpeg"), ("avi", "mjpeg"), ("mp4", "libx264")])
def test_reading_goes_on_behind_spoilt_packets(tmp_path: Path, suffix: str, codec: str) -> None:
    options = {"qmin": "1", "qmax": "2"} if codec == "mjpeg" else _FAST | {"g": "1"}
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    whole = write_video(tmp_path / f"whole.{suffix}", _numbered(100), codec=codec, pixel_format=pixels, options=options)
    path = remux(whole, tmp_path / f"clip.{suffix}", lambda i, p: _spoilt(p) if i % 10 == 5 else p)
    clip = read_clip(path, _SMALL)
    assert clip.num_source_frames == 90
    assert clip.spoilt_packets == 10
    assert np.abs(_shown(clip) - _even(0, 99)).max() <= 1  # the grid stays even in time
    path = remux(whole, tmp_path / f"ruin.{suffix}", lambda i, p: _spoilt(p) if i % 10 > 3 else p)
    with pytest.raises(
        DataError, match=r"is damaged: only 40 of its 100 frames can be decoded \(60 packets are spoilt"
    ):
        read_clip(path, _SMALL)
    path = remux(whole, tmp_path / f"none.{suffix}", lambda i, p: _spoilt(p))
    with pytest.raises(DataError, match=r"no frame of it can be decoded|cannot be decoded as a clip|holds nothing"):
        read_clip(path, _SMALL)


@pytest.mark.parametrize(
    "suffix, codec", [("ts", "libx264"), ("ts", "mpeg2video"), ("avi", "mpeg4"), ("mkv", "libx264")]
)
def test_a_recording_joined_in_the_middle_starts_where_it_can_be_shown(tmp_path: Path, suffix: str, codec: str) -> None:
    options = _FAST | {"g": "20"} if codec == "libx264" else {"g": "20", "qmin": "1", "qmax": "2", "sc_threshold": "0"}
    whole = write_video(tmp_path / f"whole.{suffix}", _numbered(100), codec=codec, options=options)
    with av.open(str(whole)) as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    start = next(key for key in keys if key >= 27)
    assert start > 27
    clip = read_clip(remux(whole, tmp_path / f"clip.{suffix}", lambda i, p: p if i >= 27 else None), _SMALL)
    assert clip.num_source_frames == 100 - start
    np.testing.assert_array_equal(_shown(clip), _even(start, 99))


def test_a_screen_recording_is_read_evenly_in_time(tmp_path: Path) -> None:
    # 50 frames in the first 1.7 s, then one now and then up to 69 s, as recorders write a screen that stands still.
    times = [*np.linspace(0, 1700, 50).round().astype(int).tolist(), 5000, 20000, 21000, 40000, 60000, 69000]
    for suffix in ("mp4", "mkv"):
        path = write_video(tmp_path / f"screen.{suffix}", _numbered(56), options=_FAST | {"bf": "0"}, times_ms=times)
        clip = read_clip(path, _SMALL)
        assert clip.num_source_frames == 56
        on_screen = np.searchsorted(np.array(times) - 18, np.linspace(0, 69000, 64), side="right") - 1
        np.testing.assert_array_equal(clip.source_indices, on_screen)
        np.testing.assert_array_equal(_shown(clip), on_screen)
        assert clip.is_duplicate.sum() == 64 - len(np.unique(on_screen))


def test_a_picture_that_stands_at_the_end_takes_its_places(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", _numbered(50), options=_FAST | {"bf": "0"})

    def stand(number: int, packet: av.Packet) -> av.Packet:
        if number == 49:
            packet.duration = round(2.04 / packet.time_base)
        return packet

    clip = read_clip(remux(whole, tmp_path / "clip.mp4", stand), _SMALL)
    np.testing.assert_array_equal(clip.source_indices, np.minimum(np.round(np.linspace(0, 99, 64)), 49))
    assert clip.is_duplicate[32:].all()


def test_frames_left_out_of_an_avi(tmp_path: Path) -> None:
    # The writer of AVI fills gaps of the clock with empty packets, which are no end of the clip.
    times = [*range(0, 1000, 40), *range(3000, 4000, 40)]
    clip = read_clip(write_video(tmp_path / "gap.avi", _numbered(50), codec="mpeg4", times_ms=times), _SMALL)
    assert clip.num_source_frames == 50
    assert (clip.source_indices == 24).sum() > 30


def test_a_stream_that_starts_late(tmp_path: Path) -> None:
    clip = read_clip(
        write_video(tmp_path / "clip.ts", _numbered(70), options=_FAST), _SMALL
    )  # its clock starts at 1.4 s
    np.testing.assert_array_equal(_shown(clip), _even(0, 69))


def test_a_recording_whose_clock_starts_anew(tmp_path: Path) -> None:
    first = write_video(tmp_path / "first.ts", _numbered(50), options=_FAST)
    second = write_video(tmp_path / "second.ts", _numbered(100)[50:], options=_FAST)
    path = tmp_path / "both.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    clip = read_clip(path, _SMALL)
    assert clip.num_source_frames == 100
    np.testing.assert_array_equal(_shown(clip), _even(0, 99))


def test_a_codec_that_nothing_decodes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", _numbered(3), options=_FAST)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(DataError, match=r"clip\.mp4 has a video stream that FFmpeg has no decoder for"):
        read_clip(path, _SMALL)


def _grid(*ticks: int | None, places: int = 8, last: int = 0, longest: float = 1e9) -> list[int]:
    return Timeline(ticks, last, longest).grid(places).tolist()


@pytest.mark.parametrize("num_frames", [1, 2, 10, 63, 64, 65, 100, 1000, 12345])
@pytest.mark.parametrize("places", [1, 2, 8, 64, 65])
@pytest.mark.parametrize("step", [33 + 1 / 3, 1001 / 24, 1000 / 60])
def test_a_constant_rate_gives_even_frame_numbers(num_frames: int, places: int, step: float) -> None:
    ticks = [round(i * step) for i in range(num_frames)]  # milliseconds, as Matroska stores them
    expected = np.round(np.linspace(0, num_frames - 1, places)).astype(int)
    for last_duration in (0, round(step), round(2 * step)):
        grid = Timeline(ticks, last_duration, 1e9).grid(places)
        assert grid.dtype == np.int32
        np.testing.assert_array_equal(grid, expected)


def test_places_of_the_grid() -> None:
    assert _grid(0, 1, 2, 3, 4, 5, 6, 7) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert _grid(0, 1, 2, 3, 14) == [0, 2, 3, 3, 3, 3, 3, 4]
    assert _grid(0, 10, 11, 12, 14) == [0, 0, 0, 0, 0, 1, 3, 4]
    assert _grid(0, 1, 2, 3, last=12) == [0, 2, 3, 3, 3, 3, 3, 3]
    assert _grid(5) == [0] * 8


def test_time_stamps_that_are_missing_or_wrong() -> None:
    plain = [0, 1, 2, 3, 4, 5, 6, 7]
    assert _grid(*[None] * 8) == plain
    assert _grid(*[None] * 7, 5, last=1000) == plain
    assert _grid(0, None, 20, 30, None, None, 60, None) == plain
    assert _grid(0, 0, 0, 0, 0, 0, 0, 0, last=1000) == plain
    assert _grid(7, 6, 5, 4, 3, 2, 1, 0) == plain
    assert _grid(100, 110, 120, 130, 0, 10, 20, 30) == plain
    assert _grid(0, 10, 20, 30, 10**9, 10**9 + 10, 10**9 + 20, 10**9 + 30, longest=1000) == plain
    assert _grid(0, 10, 10, 30, 40, 50, 60, 70) != [0] * 8
