"""Folders as users have them, through the scripts under tools/: odd files come out right, bad ones with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ove.rejects import count_rejects
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set
from tests.support.clips import moving_square, textured_background, write_sound, write_video
from tests.support.tool_scripts import reject_reasons, run_script

GOOD_PICTURES = {"a b \u00e9[red]", "print", "scan", "drawing", "turned"}


def write_pictures(folder: Path) -> None:
    """Every odd picture that must be read, and one of every bad kind."""
    folder.mkdir()
    photo = Image.fromarray(textured_background(40, 60))
    photo.save(folder / "a b \u00e9[red].jpg", quality=95)
    photo.convert("CMYK").save(folder / "print.jpg", quality=95)
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(folder / "scan.png")
    photo.save(folder / "drawing.GIF")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=exif, quality=95)
    content = (folder / "a b \u00e9[red].jpg").read_bytes()
    (folder / "cut_off.jpg").write_bytes(content[: len(content) // 2])
    (folder / "notes.jpg").write_text("not a picture")
    (folder / "nothing.png").touch()
    (folder / "link.jpg").symlink_to(folder / "gone")
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.jpg")).write_bytes(content)
    (folder / ".hidden.jpg").write_bytes(content)
    (folder / "readme.txt").write_text("not looked at")


PICTURE_REASONS = {
    "cut_off.jpg": "is a truncated or damaged picture (",
    "notes.jpg": "is not a picture: its content begins with b'not a pictur', which no picture format that is read",
    "nothing.png": "is empty (0 bytes), so it is not a picture; remove it or copy it again",
    "link.jpg": "cannot be read (No such file or directory); check the path and its permissions",
    r"bad\udcff.jpg": "is not UTF-8, so records cannot hold it; rename the file",
}


def test_a_folder_of_all_kinds_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rejects = tmp_path / "my pictures \u00fc", tmp_path / "rejects.jsonl"
    write_pictures(folder)
    common = ["--workers", 1, "--rejects", rejects]
    assert run_script("clustering/1_describe_pictures.py", folder, tmp_path / "d.npz", *common) == 0
    assert "5 pictures described by colour-and-gradient-1 (5 new, 0 kept), 5 rejected" in capsys.readouterr().out
    reasons = reject_reasons(rejects)
    assert set(reasons) == set(PICTURE_REASONS)
    for name, reason in PICTURE_REASONS.items():
        assert reason in reasons[name]
    cluster = [tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 2, "--centers", tmp_path / "c.npz"]
    assert run_script("clustering/2_cluster_descriptors.py", *cluster) == 0
    assert run_script("clustering/3_write_image_shards.py", tmp_path / "l.npz", tmp_path / "set", *common) == 0
    assert validate_shard_set(tmp_path / "set", deep=True) == []
    assert count_rejects(rejects) == {"images": 5}
    check_pictures(ShardSet.open(tmp_path / "set"), np.load(tmp_path / "l.npz"))


def check_pictures(shards: ShardSet, labelled) -> None:
    """Every good picture is there, upright, with the content of the photograph that all were made of."""
    import cv2

    names = {str(key): Path(str(file)).stem for key, file in zip(labelled["keys"], labelled["files"], strict=True)}
    assert {names[shards.key(i)] for i in range(len(shards))} == GOOD_PICTURES
    photo = textured_background(40, 60)
    for i in range(len(shards)):
        stored = cv2.imdecode(np.frombuffer(shards.read(i, "jpg"), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        name = names[shards.key(i)]
        expected = np.rot90(photo, -1) if name == "turned" else photo
        assert stored.shape == expected.shape == (shards.height[i], shards.width[i], 3), name
        if name == "scan":
            stored, expected = stored.mean(-1), expected @ np.array([0.299, 0.587, 0.114])
        assert np.abs(stored.astype(float) - expected).mean() < 8, name


def write_clips(folder: Path) -> None:
    """Short, one frame, 10 bit, full range, odd-sized; then what is no clip."""
    folder.mkdir()
    frames = moving_square(6)[0]
    quiet = {"x265-params": "log-level=none"}
    write_video(folder / "short.mp4", frames)
    write_video(folder / "one.mkv", frames[:1])
    write_video(folder / "ten bit.mp4", frames, codec="libx265", pixel_format="yuv420p10le", options=quiet)
    write_video(folder / "full.mp4", frames, pixel_format="yuvj420p", full_range=True)
    write_video(folder / "odd.mkv", frames[:, :109, :111], codec="ffv1", pixel_format="yuv444p")
    write_sound(folder / "song.mp4")
    (folder / "notes.mp4").write_text("not a clip " * 100)
    (folder / "nothing.webm").touch()


CLIP_REASONS = {
    "song.mp4": "has no video stream (it holds audio), so there are no frames to read; remove it",
    "notes.mp4": "it is truncated, damaged or no video; copy it again or remove it",
    "nothing.webm": "is empty (0 bytes), so it is not a clip; remove it or copy it again",
}


def test_a_folder_of_all_kinds_of_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, stored, rejects = tmp_path / "clips", tmp_path / "stored", tmp_path / "rejects.jsonl"
    write_clips(clips)
    common = ["--workers", 1, "--rejects", rejects]
    size = ["--frame-height", 56, "--frame-width", 56, "--patch-budget", 32]
    assert run_script("codec/1_select_patches.py", clips, stored, *size, *common) == 0
    assert "5 clips (5 new, 0 kept), " in capsys.readouterr().out
    reasons = reject_reasons(rejects)
    assert set(reasons) == set(CLIP_REASONS)
    for name, reason in CLIP_REASONS.items():
        assert reason in reasons[name]
    assert run_script("codec/2_describe_clips.py", stored, tmp_path / "d.npz", *common) == 0
    cluster = [tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 2, "--centers", tmp_path / "c.npz"]
    assert run_script("clustering/2_cluster_descriptors.py", *cluster) == 0
    damaged = next(stored.glob("full-*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:300])  # the disk lost a part of one between the steps
    write = ["codec/3_write_clip_shards.py", stored, tmp_path / "l.npz", tmp_path / "set", "--rejects", rejects]
    assert run_script(*write) == 0
    assert "4 clips, 2 classes, 1 rejected" in capsys.readouterr().out
    assert "is not a stored clip" in reject_reasons(rejects)["full.mp4"]
    assert count_rejects(rejects) == {"clips": 3, "clip shards": 1}
    assert validate_shard_set(tmp_path / "set", deep=True) == []
    shards = ShardSet.open(tmp_path / "set")
    patches = {shards.key(i).rsplit("-", 1)[0]: int(shards.num_patches[i]) for i in range(len(shards))}
    assert set(patches) == {"short", "one", "ten_bit", "odd"}
    assert patches["one"] == 16  # its only frame, and no repeat of it


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("clustering/3_write_image_shards.py", ["--quality", "500"], "--quality: 500 is not a whole number from 1 to"),
        (
            "clustering/3_write_image_shards.py",
            ["--patch-size", "0"],
            "--patch-size: 0 is not a whole number of at lea",
        ),
        ("ocr/1_recognize_pages.py", ["--workers", "two"], "--workers: two is not a whole number of at least 1"),
        ("codec/1_select_patches.py", ["--patch-size", "0"], "--patch-size: 0 is not a whole number of at least 1"),
    ],
)
def test_numbers_that_make_no_sense(script: str, arguments: list[str], sentence: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script(script, "in", "out", *arguments)
    assert caught.value.code == 2
    assert f"error: argument {sentence}" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_a_sentence(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(textured_background(40, 60)).save(tmp_path / "in" / "a.png")
    (tmp_path / "file").touch()
    script, common = "clustering/1_describe_pictures.py", ["--workers", 1]
    rejects = ["--rejects", tmp_path / "rejects.jsonl"]
    assert run_script(script, tmp_path / "in", tmp_path / "file" / "d.npz", *common, *rejects) == 2
    assert f"error: {tmp_path}/file cannot be used (File exists); check the path" in capsys.readouterr().err
    assert run_script(script, tmp_path / "in", tmp_path / "d.npz", *common, "--rejects", tmp_path) == 2
    assert f"error: {tmp_path} cannot be used (Is a directory); check the path" in capsys.readouterr().err
