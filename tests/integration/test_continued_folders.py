"""Work that was done stays: a second folder adds, a file is known by any path, a changed one is done again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from megatron_ove.shards.shard_set import ShardSet
from tests.support.clips import moving_square, textured_background, write_video
from tests.support.tool_scripts import reject_reasons, run_script


def write_page(path: Path, *lines: str) -> Image.Image:
    """Writes a page with large print; returns it."""
    page = Image.new("RGB", (420, 60 * len(lines) + 30), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(28)
    for number, line in enumerate(lines):
        draw.text((30, 25 + 60 * number), line, font=font, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return page


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(record: dict[str, object]) -> str:
    return " ".join(line["text"] for line in record["lines"])  # type: ignore[index, attr-defined]


def test_pages_of_two_folders_and_several_sheets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, rejects = tmp_path / "lines.jsonl", tmp_path / "rejects.jsonl"
    common = ["--workers", 1, "--rejects", rejects]
    write_page(tmp_path / "A/page.png", "river stone")
    sheets = [write_page(tmp_path / "x.png", line) for line in ("orange silver", "valley forest")]
    (tmp_path / "B").mkdir()
    sheets[0].copy().save(tmp_path / "B/scan.tif", save_all=True, append_images=[sheets[1].copy()])
    write_page(tmp_path / "B/page.png", "bridge yellow")
    monkeypatch.chdir(tmp_path)
    assert run_script("ocr/1_recognize_pages.py", "A", lines, *common) == 0  # a relative path
    assert run_script("ocr/1_recognize_pages.py", tmp_path / "B", lines, *common) == 0
    assert "3 pages (3 new, 0 kept, 1 of elsewhere kept), 0 rejected" in capsys.readouterr().out
    records = read_lines(lines)
    assert [texts(record) for record in records] == ["river stone", "bridge yellow", "orange silver", "valley forest"]
    assert len({record["key"] for record in records}) == 4
    assert [record.get("sheet", 0) for record in records] == [0, 0, 0, 1]

    (tmp_path / "again").symlink_to(tmp_path / "A")
    assert run_script("ocr/1_recognize_pages.py", "again", lines, *common) == 0
    assert "1 pages (0 new, 1 kept, 3 of elsewhere kept), 0 rejected" in capsys.readouterr().out

    write_page(tmp_path / "A/page.png", "castle engine")
    build = ["ocr/2_build_vocabulary.py", lines, "--output", tmp_path / "words.json", "--min-pages", 1]
    shards = ["ocr/3_write_page_shards.py", lines, tmp_path / "set", "--vocabulary", tmp_path / "words.json", *common]
    assert run_script(*build) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_script(*shards) == 0
    assert len(ShardSet.open(tmp_path / "set")) == 3
    assert "has changed since tools/ocr/1_recognize_pages.py looked at it" in reject_reasons(rejects)["page.png"]
    assert run_script("ocr/1_recognize_pages.py", tmp_path / "A", lines, *common) == 0
    assert {texts(record) for record in read_lines(lines)} >= {"castle engine", "bridge yellow"}
    assert run_script(*build) == 0
    assert run_script(*shards, "--overwrite") == 0
    assert len(ShardSet.open(tmp_path / "set")) == 4

    capsys.readouterr()
    before = lines.read_bytes()
    assert run_script("ocr/1_recognize_pages.py", tmp_path / "A", lines, *common, "--detection-side", 640) == 2
    assert "(detection_side 1280 there, 640 now), which do not go together" in capsys.readouterr().err
    assert lines.read_bytes() == before


def test_pictures_of_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--workers", 1, "--rejects", tmp_path / "rejects.jsonl"]
    for number, folder in enumerate(("A", "B")):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.roll(textured_background(40, 60), 9 * number, 1)).save(tmp_path / folder / "same_name.png")
    for folder in ("A", "B"):
        assert run_script("clustering/1_describe_pictures.py", tmp_path / folder, tmp_path / "d.npz", *common) == 0
    assert (
        "1 pictures described by colour-and-gradient-1 (1 new, 0 kept, 1 of elsewhere kept)" in capsys.readouterr().out
    )
    cluster = [tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 2, "--centers", tmp_path / "c.npz"]
    assert run_script("clustering/2_cluster_descriptors.py", *cluster) == 0
    os.utime(tmp_path / "A/same_name.png", ns=(5, 5))
    write = ["clustering/3_write_image_shards.py", tmp_path / "l.npz"]
    assert run_script(*write, tmp_path / "set", *common) == 0
    shards = ShardSet.open(tmp_path / "set")
    assert [shards.key(i) for i in range(len(shards))] == ["same_name-c2e82901c9ad9dfc-2"]
    assert "A/same_name.png has changed since" in reject_reasons(tmp_path / "rejects.jsonl")["same_name.png"]


def test_pictures_behind_links_keep_the_suffix_of_the_link(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        texture = np.roll(textured_background(40, 60), 9 * number, 1)
        Image.fromarray(texture).save(tmp_path / f"{number}", format="TGA")
        (tmp_path / f"in/{number}.tga").symlink_to(tmp_path / f"{number}")
    common = ["--workers", 1, "--rejects", tmp_path / "rejects.jsonl"]
    assert run_script("clustering/1_describe_pictures.py", tmp_path / "in", tmp_path / "d.npz", *common) == 0
    cluster = [tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 2, "--centers", tmp_path / "c.npz"]
    assert run_script("clustering/2_cluster_descriptors.py", *cluster) == 0
    assert run_script("clustering/3_write_image_shards.py", tmp_path / "l.npz", tmp_path / "set", *common) == 0
    assert len(ShardSet.open(tmp_path / "set")) == 2


def test_clips_of_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, rejects = tmp_path / "stored", tmp_path / "rejects.jsonl"
    common = ["--workers", 1, "--rejects", rejects, "--frame-height", 56, "--frame-width", 56]
    for number, folder in enumerate(("A", "B")):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "clip.mp4", moving_square(4 + number)[0])
        assert run_script("codec/1_select_patches.py", tmp_path / folder, stored, *common) == 0
    assert "1 clips (1 new, 0 kept, 1 of elsewhere kept)" in capsys.readouterr().out
    assert sorted(record["source_frames"] for record in read_lines(stored / "clips.jsonl")) == [4, 5]  # type: ignore[type-var]
    assert len(list(stored.glob("*.npz"))) == 2
    assert run_script("codec/2_describe_clips.py", stored, tmp_path / "d.npz", *common[:4]) == 0
    cluster = [tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 2, "--centers", tmp_path / "c.npz"]
    assert run_script("clustering/2_cluster_descriptors.py", *cluster) == 0
    write_video(tmp_path / "B/clip.mp4", moving_square(6)[0])
    table = (stored / "clips.jsonl").read_bytes()
    assert run_script("codec/1_select_patches.py", tmp_path / "B", stored, *common) == 0
    write = ["codec/3_write_clip_shards.py", stored, tmp_path / "l.npz", tmp_path / "set", "--rejects", rejects]
    new_table = (stored / "clips.jsonl").read_bytes()
    (stored / "clips.jsonl").write_bytes(table)  # as if it was killed before its end
    assert run_script(*write) == 0
    assert "was selected again by a run of step 1 that did not get to its end" in reject_reasons(rejects)["clip.mp4"]
    assert len(ShardSet.open(tmp_path / "set")) == 1
    (stored / "clips.jsonl").write_bytes(new_table)
    assert run_script(*write, "--overwrite") == 0
    assert "was selected again since it got labels" in reject_reasons(rejects)["clip.mp4"]
    assert len(ShardSet.open(tmp_path / "set")) == 1
    assert run_script("codec/1_select_patches.py", tmp_path / "A", stored, *common, "--min-score", 0.5) == 2
    assert "(min_score 0.08 there, 0.5 now), which do not go together" in capsys.readouterr().err


@pytest.mark.parametrize("victim", ["pictures", "a set with a file of mine", "file"])
def test_overwrite_replaces_nothing_but_a_shard_set(tmp_path: Path, victim: str, capsys) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        Image.fromarray(np.roll(textured_background(40, 60), 9 * number, 1)).save(tmp_path / f"in/{number}.png")
    common = ["--workers", 1, "--rejects", tmp_path / "rejects.jsonl"]
    assert run_script("clustering/1_describe_pictures.py", tmp_path / "in", tmp_path / "d.npz", *common) == 0
    cluster = [tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 2, "--centers", tmp_path / "c.npz"]
    assert run_script("clustering/2_cluster_descriptors.py", *cluster) == 0
    write = ["clustering/3_write_image_shards.py", tmp_path / "l.npz"]
    target = tmp_path / "out"
    if victim == "file":
        target.write_text("mine")
    elif victim == "pictures":
        target.mkdir()
        (target / "photo.jpg").write_text("mine")
    else:
        assert run_script(*write, target, *common) == 0
        (target / "notes.txt").write_text("mine")
    for neighbour in ("out.old", "out.new", "out.tmp"):
        (tmp_path / neighbour).mkdir()
    before = sorted(path for path in tmp_path.rglob("*") if "rejects" not in path.name)
    capsys.readouterr()
    assert run_script(*write, target, *common, "--overwrite") == 2
    assert "so it is not overwritten; name another folder, or delete it yourself" in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*") if "rejects" not in path.name) == before
    if victim.startswith("a set"):
        (target / "notes.txt").unlink()
        assert run_script(*write, target, *common, "--overwrite") == 0
        assert len(ShardSet.open(target)) == 2
