"""Reading clips of every kind onto the 64-frame grid, and refusing what is no clip."""

from __future__ import annotations

from pathlib import Path

import av.error
import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess.codec.clip_frames import read_clip
from megatron_ove.preprocess.codec.clip_reading import open_clip
from megatron_ove.preprocess.codec.settings import CodecSettings
from tests.support.clips import moving_square, textured_background, write_sound, write_video

_SMALL = CodecSettings(frame_height=56, frame_width=56, patch_budget=128)


def _ramp(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Grey frames whose level rises with time: frame i is about 2 * i + 40."""
    levels = (40 + 2 * np.arange(num_frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3))


@pytest.mark.parametrize(
    "suffix, codec",
    [
        ("mp4", "libx264"),
        ("mp4", "libx265"),
        ("mkv", "libx264"),
        ("webm", "libvpx-vp9"),
        ("mp4", "libsvtav1"),
        ("avi", "mpeg4"),
    ],
)
def test_codecs_and_uniform_sampling(tmp_path: Path, suffix: str, codec: str) -> None:
    fast = {"libx264": {"preset": "ultrafast"}, "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"}}
    fast |= {
        "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime"},
        "libsvtav1": {"preset": "12"},
        "mpeg4": {"qmax": "3"},
    }
    path = write_video(tmp_path / f"clip.{suffix}", _ramp(100), codec=codec, options=fast.get(codec))
    clip = read_clip(path, _SMALL)
    assert clip.frames.shape == (64, 56, 56, 3)
    assert clip.num_source_frames == 100
    assert not clip.is_duplicate.any()
    np.testing.assert_array_equal(clip.source_indices, np.round(np.linspace(0, 99, 64)).astype(int))
    np.testing.assert_allclose(clip.frames.mean(axis=(1, 2, 3)), 40 + 2 * clip.source_indices, atol=4)


def test_short_clip_repeats_frames_and_marks_them(tmp_path: Path) -> None:
    clip = read_clip(write_video(tmp_path / "short.mp4", _ramp(10)), _SMALL)
    assert clip.num_source_frames == 10
    assert clip.is_duplicate.sum() == 54
    assert not clip.is_duplicate[0]
    assert len(np.unique(clip.source_indices)) == 10


def test_one_frame(tmp_path: Path) -> None:
    clip = read_clip(write_video(tmp_path / "one.mp4", _ramp(1)), _SMALL)
    assert clip.num_source_frames == 1
    assert clip.is_duplicate.tolist() == [False] + [True] * 63


@pytest.mark.parametrize("pixel_format, full_range", [("yuv420p", False), ("yuv420p10le", False), ("yuvj420p", True)])
def test_ten_bit_and_full_range_keep_their_levels(tmp_path: Path, pixel_format: str, full_range: bool) -> None:
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    frames[:, :, 32:] = 235
    frames[:, 32:] += 10
    codec = "libx265" if "10" in pixel_format else "libx264"
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {"crf": "10"}
    path = tmp_path / "levels.mp4"
    write_video(path, frames, codec=codec, pixel_format=pixel_format, options=options, full_range=full_range)
    clip = read_clip(path, _SMALL)
    levels = [clip.frames[0, y, x].mean() for y, x in ((10, 10), (10, 45), (45, 10), (45, 45))]
    np.testing.assert_allclose(levels, [0, 235, 10, 245], atol=5)


def test_odd_size_is_centre_cropped(tmp_path: Path) -> None:
    frames = np.zeros((3, 65, 131, 3), np.uint8)
    frames[:, :, 33:98] = 200  # the middle square
    path = write_video(tmp_path / "odd.mkv", frames, codec="ffv1", pixel_format="yuv444p")
    clip = read_clip(path, _SMALL)
    assert clip.content_box == (0, 0, 56, 56)
    assert clip.frames[0, 2:-2, 2:-2].min() > 180


def test_letterbox_keeps_everything_between_bars(tmp_path: Path) -> None:
    path = write_video(tmp_path / "wide.mp4", np.full((3, 32, 64, 3), 250, np.uint8))
    settings = CodecSettings(frame_height=56, frame_width=56, patch_budget=128, fit="letterbox")
    clip = read_clip(path, settings)
    assert clip.content_box == (14, 0, 28, 56)
    assert (clip.frames[0, :14] == 128).all()
    assert clip.frames[0, 15:41].min() > 240


def test_wide_grid(tmp_path: Path) -> None:
    path = write_video(tmp_path / "wide.mp4", _ramp(3, 64, 128))
    settings = CodecSettings(frame_height=56, frame_width=112, patch_budget=128)
    assert (settings.grid_height, settings.grid_width) == (4, 8)
    assert read_clip(path, settings).frames.shape == (64, 56, 112, 3)


def test_no_video_stream(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "song.mp4")
    with pytest.raises(DataError, match=r"song\.mp4 has no video stream \(it holds audio\), so there are no frames"):
        read_clip(path, _SMALL)


def test_text_file_and_empty_file(tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("This is not a clip. " * 50)
    with pytest.raises(DataError, match=r"notes\.mp4 cannot be decoded as a clip \(FFmpeg: Invalid data found"):
        read_clip(tmp_path / "notes.mp4", _SMALL)
    (tmp_path / "nothing.mp4").touch()
    with pytest.raises(DataError, match=r"nothing\.mp4 is empty \(0 bytes\), so it is not a clip"):
        read_clip(tmp_path / "nothing.mp4", _SMALL)
    with pytest.raises(DataError, match=r"absent\.mp4 does not exist"):
        read_clip(tmp_path / "absent.mp4", _SMALL)


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("kind", ["index at the end", "index in front", "matroska"])
def test_truncated_clips(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3)).astype(np.uint8)
    suffix = "mkv" if kind == "matroska" else "mp4"
    options = {"movflags": "faststart"} if kind == "index in front" else {}
    path = write_video(tmp_path / f"whole.{suffix}", noise, container_options=options, options={"preset": "ultrafast"})
    content = path.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(content[: int(len(content) * share)])
    sentence = (
        "it is truncated, damaged or no video" if kind == "index at the end" else r"is truncated: it announces \d+"
    )
    with pytest.raises(DataError, match=sentence):
        read_clip(cut, _SMALL)
    assert read_clip(path, _SMALL).num_source_frames == 70


def test_rotation_tag_is_applied(tmp_path: Path) -> None:
    frames, _ = moving_square(4)
    path = tmp_path / "phone.mp4"
    write_video(path, frames)
    upright = read_clip(path, _SMALL).frames[0]
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # version 0: the 3 x 3 display matrix follows 40 bytes of fields
    matrix = np.array([0, 0x10000, 0, -0x10000, 0, 0, 112 << 16, 0, 0x40000000], ">i4")
    content[place : place + 36] = matrix.tobytes()
    path.write_bytes(content)
    turned = read_clip(path, _SMALL).frames[0]
    difference = {k: np.abs(np.rot90(upright, k).astype(int) - turned).mean() for k in range(4)}
    assert min(difference, key=difference.get) == 3, difference  # 90 degrees clockwise, as players show it
    assert difference[3] < 1


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"frame_height": 100}, r"frame_height = 100 must be an even multiple of patch_size = 14.*; 98 would do"),
        ({"patch_size": 7, "frame_width": 217, "frame_height": 224}, r"frame_width = 217 must be an even multiple"),
        ({"patch_budget": 255}, r"patch_budget = 255 is less than the 256 patches of the first frame"),
        ({"num_frames": 0}, r"num_frames = 0, but a clip needs at least one frame"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        CodecSettings(**changes)


def test_settings_round_trip_with_versions() -> None:
    record = _SMALL.as_record()
    assert record["pyav"]
    assert CodecSettings.from_record(record) == _SMALL


def test_background_helper_is_textured() -> None:
    assert textured_background(32, 32).std() > 30


@pytest.mark.parametrize("content", ["ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n"])
def test_a_list_that_names_other_files_opens_none(content: str, tmp_path: Path) -> None:
    write_video(tmp_path / "secret.mp4", moving_square(4)[0])
    with open_clip(tmp_path / "secret.mp4") as (container, _):
        assert "mp4" in container.format.name
    (tmp_path / "list.mp4").write_text(content)
    with pytest.raises((DataError, av.error.FFmpegError)), open_clip(tmp_path / "list.mp4"):
        raise AssertionError("it was opened")
