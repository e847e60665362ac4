"""The scripts under tools/, end to end: demo input, bad files, re-runs, and real files when they are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ove.preprocess.ocr.words import segment_words
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set
from megatron_ove.vocabulary import Vocabulary
from tests.support.clips import moving_square, write_sound, write_video
from tests.support.tool_scripts import reject_reasons, run_script

_ROOT = Path(__file__).resolve().parents[2]
_SAMPLES = _ROOT.parent / "shared" / "samples"


def _ok(script: str, *arguments: object) -> None:
    assert run_script(script, *arguments) == 0, script


def _add_bad_files(folder: Path, *, kind: str) -> None:
    """Puts one of every bad file beside good ones."""
    if kind == "clips":
        (folder / "notes.mp4").write_text("not a clip " * 100)
        write_sound(folder / "song.mp4")
        content = next(folder.glob("*.mp4")).read_bytes()
        (folder / "cut_off.mp4").write_bytes(content[: len(content) // 2])
        return
    (folder / "notes.jpg").write_text("not a picture")
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "cut_off.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    (folder / "whole.jpg").unlink()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tools") / "demo"
    sizes = ["--images", 30, "--held-out-images", 6, "--pages", 8, "--held-out-pages", 2, "--clips", 4]
    sizes += ["--page-width", 336, "--page-height", 224, "--clip-frames", 66, "--held-out-clip-frames", 20]
    _ok("demo_input/make_demo_input.py", root, *sizes, "--workers", 1, "--rejects", root.parent / "r.jsonl")
    return root


def test_demo_input_is_the_same_again_and_a_rerun_does_nothing(demo: Path, tmp_path: Path, capsys) -> None:
    names = sorted(path.relative_to(demo).as_posix() for path in demo.rglob("*.*"))
    assert sum("/clips/" in name for name in names) == 8
    sizes = ["--images", 30, "--held-out-images", 6, "--pages", 8, "--held-out-pages", 2, "--clips", 4]
    sizes += ["--page-width", 336, "--page-height", 224, "--clip-frames", 66, "--held-out-clip-frames", 20]
    other = tmp_path / "again"
    _ok("demo_input/make_demo_input.py", other, *sizes, "--workers", 2, "--rejects", tmp_path / "r.jsonl")
    for name in names:
        assert (demo / name).read_bytes() == (other / name).read_bytes(), name
    _ok("demo_input/make_demo_input.py", other, *sizes, "--rejects", tmp_path / "r.jsonl")
    assert "nothing to do" in capsys.readouterr().out
    assert run_script("demo_input/make_demo_input.py", other, "--seed", 1, "--rejects", tmp_path / "r.jsonl") == 2
    assert "is not empty and holds something else" in capsys.readouterr().err


def test_pages_become_a_shard_set(demo: Path, tmp_path: Path, capsys) -> None:
    pages, lines, rejects = tmp_path / "pages", tmp_path / "lines.jsonl", tmp_path / "rejects.jsonl"
    shutil.copytree(demo / "train" / "pages", pages)
    _add_bad_files(pages, kind="pages")
    Image.new("RGB", (200, 200), (250, 240, 230)).save(pages / "blank.png")
    common = ["--workers", 1, "--rejects", rejects]
    _ok("ocr/1_recognize_pages.py", pages, lines, *common)
    _ok("ocr/2_build_vocabulary.py", lines, "--output", tmp_path / "vocabulary.json", "--min-pages", 1)
    shards = [lines, tmp_path / "shards", "--vocabulary", tmp_path / "vocabulary.json", *common]
    _ok("ocr/3_write_page_shards.py", *shards)
    vocabulary = Vocabulary.load(tmp_path / "vocabulary.json")
    reasons = reject_reasons(rejects)
    assert set(reasons) == {"notes.jpg", "cut_off.jpg", "blank.png"}
    assert reasons["notes.jpg"].endswith("whatever the file is called; remove it or convert it to PNG")
    assert "is a truncated or damaged picture (2000 bytes" in reasons["cut_off.jpg"]
    assert reasons["blank.png"] == "the page has no text: no line was recognized"

    assert not validate_shard_set(tmp_path / "shards", deep=True)
    stored = ShardSet.open(tmp_path / "shards")
    assert len(stored.labels) == 8
    assert stored.labels.shape[1] == 100
    assert stored.read_vocabulary() == vocabulary
    truth = [json.loads(line) for line in (demo / "page_truth.jsonl").read_text().splitlines()]
    english = next(page for page in truth if page["language"] == "en" and page["split"] == "train")
    keys = [
        json.loads(line)["key"] for line in sorted(lines.read_text().splitlines(), key=lambda x: json.loads(x)["file"])
    ]
    row = next(i for i, key in enumerate([k for k in keys if "blank" not in k]) if key.startswith("en_"))
    tags = {vocabulary.words[i] for i in stored.labels[row] if i >= 0}
    expected = {word for line in english["lines"] for word in segment_words(line["text"])}
    assert len(tags & expected) > 0.85 * len(expected)

    capsys.readouterr()
    _ok("ocr/1_recognize_pages.py", pages, lines, *common)
    assert "9 pages (0 new, 9 kept), 2 rejected" in capsys.readouterr().out
    assert run_script("ocr/3_write_page_shards.py", *shards) == 2
    assert "exists already and would be overwritten" in capsys.readouterr().err
    _ok("ocr/3_write_page_shards.py", *shards, "--overwrite")
    assert len(reject_reasons(rejects)) == 3
    assert len(rejects.read_text().splitlines()) == 3  # judged again, not counted twice


def test_images_become_a_shard_set_and_held_out_ones_use_its_centers(demo: Path, tmp_path: Path, capsys) -> None:
    images, rejects = tmp_path / "images", tmp_path / "rejects.jsonl"
    shutil.copytree(demo / "train" / "images", images)
    _add_bad_files(images, kind="images")
    common = ["--workers", 1, "--rejects", rejects]
    _ok("clustering/1_describe_pictures.py", images, tmp_path / "d.npz", *common)
    cluster = "clustering/2_cluster_descriptors.py"
    _ok(cluster, tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 12, "--centers", tmp_path / "c.npz")
    _ok("clustering/3_write_image_shards.py", tmp_path / "l.npz", tmp_path / "shards", *common)
    assert set(reject_reasons(rejects)) == {"notes.jpg", "cut_off.jpg"}
    assert not validate_shard_set(tmp_path / "shards", deep=True)
    stored = ShardSet.open(tmp_path / "shards")
    assert stored.labels.shape == (30, 6)  # half the clusters: with all of them samples could not be told apart
    assert set(np.asarray(stored.labels)[:, 0].tolist()) == set(range(12))  # no cluster is empty

    _ok("clustering/1_describe_pictures.py", demo / "held_out" / "images", tmp_path / "hd.npz", *common)
    _ok(cluster, tmp_path / "hd.npz", tmp_path / "hl.npz", "--use-centers", tmp_path / "c.npz")
    _ok("clustering/3_write_image_shards.py", tmp_path / "hl.npz", tmp_path / "held", *common)
    assert ShardSet.open(tmp_path / "held").info.num_classes == 12

    capsys.readouterr()
    assert (
        run_script(cluster, tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 99, "--centers", tmp_path / "x.npz")
        == 2
    )
    assert "30 samples cannot make num_clusters = 99 clusters" in capsys.readouterr().err
    few = ["--clusters", 6, "--num-labels", 10, "--centers", tmp_path / "x.npz"]
    assert run_script(cluster, tmp_path / "d.npz", tmp_path / "l.npz", *few) == 2
    sentence = (
        "--num-labels 10 with 6 clusters would make every cluster a label of every sample, so that training could"
    )
    errors = capsys.readouterr().err
    assert sentence in errors and "; give --num-labels 3 or fewer, or more clusters" in errors
    assert run_script(cluster, tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 3) == 2
    assert "--centers must say where to keep them" in capsys.readouterr().err


def test_clips_become_a_shard_set(demo: Path, tmp_path: Path) -> None:
    clips, rejects = tmp_path / "clips", tmp_path / "rejects.jsonl"
    shutil.copytree(demo / "train" / "clips", clips)
    _add_bad_files(clips, kind="clips")
    write_video(clips / "one_frame.mkv", moving_square(1)[0])
    common = ["--workers", 1, "--rejects", rejects]
    select = ["codec/1_select_patches.py", clips, tmp_path / "selected", "--frame-height", 112, "--frame-width", 112]
    _ok(*select, "--contact-sheets", tmp_path / "sheets", *common)
    reasons = reject_reasons(rejects)
    assert set(reasons) == {"notes.mp4", "song.mp4", "cut_off.mp4"}
    assert "has no video stream (it holds audio)" in reasons["song.mp4"]
    assert len(list((tmp_path / "sheets").glob("*.jpg"))) == 5
    _ok("codec/2_describe_clips.py", tmp_path / "selected", tmp_path / "d.npz", *common)
    cluster = [tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 4, "--centers", tmp_path / "c.npz"]
    _ok("clustering/2_cluster_descriptors.py", *cluster)
    _ok(
        "codec/3_write_clip_shards.py",
        tmp_path / "selected",
        tmp_path / "l.npz",
        tmp_path / "shards",
        "--rejects",
        rejects,
    )
    assert not validate_shard_set(tmp_path / "shards", deep=True)
    stored = ShardSet.open(tmp_path / "shards")
    assert len(stored.labels) == 5
    assert sorted(stored.num_patches.tolist()) == [64, 512, 512, 512, 512]  # one frame: its patches and no more
    assert json.loads((tmp_path / "shards" / "codec_settings.json").read_text())["frame_width"] == 112


@pytest.mark.parametrize(
    "script, arguments, sentence",
    [
        ("ocr/1_recognize_pages.py", ["IN", "OUT"], "the picture folder"),
        ("clustering/1_describe_pictures.py", ["IN", "OUT"], "the picture folder"),
        ("codec/1_select_patches.py", ["IN", "OUT"], "the clip folder"),
    ],
)
def test_empty_folders(script: str, arguments: list[str], sentence: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "IN").mkdir()
    assert run_script(script, *(tmp_path / a for a in arguments), "--rejects", tmp_path / "r.jsonl") == 2
    error = capsys.readouterr().err
    assert f"error: {sentence}" in error
    assert "not even in its subfolders" in error


@pytest.mark.parametrize(
    "script, name, sentence",
    [
        ("ocr/1_recognize_pages.py", "notes.jpg", "none of the 1 files in"),
        ("clustering/1_describe_pictures.py", "notes.jpg", "none of the 1 files in"),
        ("codec/1_select_patches.py", "notes.mp4", "none of the 1 files in"),
    ],
)
def test_folder_with_nothing_usable(script: str, name: str, sentence: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "IN").mkdir()
    (tmp_path / "IN" / name).write_text("just text")
    arguments = (tmp_path / "IN", tmp_path / "OUT", "--workers", 1, "--rejects", tmp_path / "r.jsonl")
    assert run_script(script, *arguments) == 2
    assert sentence in capsys.readouterr().err
    assert name in reject_reasons(tmp_path / "r.jsonl")


def test_workers_share_the_work_and_report_the_same(demo: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        _ok(
            "clustering/1_describe_pictures.py",
            demo / "train" / "images",
            tmp_path / f"{workers}.npz",
            "--workers",
            workers,
            "--rejects",
            tmp_path / "r.jsonl",
        )
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


@pytest.mark.skipif(not _SAMPLES.is_dir(), reason="no sample files beside the repository")
def test_real_files_go_through_all_tools(tmp_path: Path) -> None:
    common = ["--workers", 2, "--rejects", tmp_path / "rejects.jsonl"]
    _ok("ocr/1_recognize_pages.py", _SAMPLES / "images", tmp_path / "lines.jsonl", *common)
    _ok("ocr/2_build_vocabulary.py", tmp_path / "lines.jsonl", "--output", tmp_path / "v.json", "--min-pages", 1)
    _ok(
        "ocr/3_write_page_shards.py",
        tmp_path / "lines.jsonl",
        tmp_path / "pages",
        "--vocabulary",
        tmp_path / "v.json",
        *common,
    )
    _ok("clustering/1_describe_pictures.py", _SAMPLES / "images", tmp_path / "d.npz", *common)
    cluster = "clustering/2_cluster_descriptors.py"
    _ok(cluster, tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 5, "--centers", tmp_path / "c.npz")
    _ok("clustering/3_write_image_shards.py", tmp_path / "l.npz", tmp_path / "images", *common)
    _ok("codec/1_select_patches.py", _SAMPLES / "videos", tmp_path / "clips", *common)
    _ok("codec/2_describe_clips.py", tmp_path / "clips", tmp_path / "cd.npz", *common)
    _ok(cluster, tmp_path / "cd.npz", tmp_path / "cl.npz", "--clusters", 3, "--centers", tmp_path / "cc.npz")
    _ok("codec/3_write_clip_shards.py", tmp_path / "clips", tmp_path / "cl.npz", tmp_path / "video", *common[2:])
    for name, count in (("images", 13), ("video", 7)):
        assert not validate_shard_set(tmp_path / name, deep=True)
        assert len(ShardSet.open(tmp_path / name).labels) == count
    pages = ShardSet.open(tmp_path / "pages")
    words = Vocabulary.load(tmp_path / "v.json").words
    tags = {words[i] for row in np.asarray(pages.labels) for i in row if i >= 0}
    assert 9 <= len(pages.labels) <= 12  # the pictures without text are rejected with a reason
    assert len(tags) > 100
    assert set(reject_reasons(tmp_path / "rejects.jsonl")) >= {"skimage_coffee.png"}
