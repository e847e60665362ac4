"""`train --check` looks at the shard sets, and a number of classes may be left to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_ove.cli.main import main
from megatron_ove.data.synthetic import write_synthetic_shard_set
from tests.support.tiny_run import (
    NUM_CLASSES,
    tiny_config,
    write_config,
    write_tiny_sources,
    write_tiny_vocabulary,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def config_file(sources: dict[str, str], tmp_path: Path, **num_classes: int | None) -> Path:
    data = tiny_config(sources, tmp_path / "run", train={"num_steps": 2}, optim={"schedule": {"warmup_steps": 0}})
    for kind, count in num_classes.items():
        data["objectives"][f"{kind}_labels"]["num_classes"] = count
        if count is None:
            del data["objectives"][f"{kind}_labels"]["num_classes"]
    return write_config(data, tmp_path / "config.yaml")


def test_sets_that_fit_are_checked_and_nothing_is_started(sources, tmp_path, capsys) -> None:
    assert main(["train", str(config_file(sources, tmp_path, ocr=None)), "--check"]) == 0
    assert capsys.readouterr() == (f"{tmp_path}/run\n", "")
    assert not (tmp_path / "run").exists()


def test_all_problems_are_told_at_once(sources, tmp_path, capsys) -> None:
    path = config_file({**sources, "ocr": str(tmp_path / "nowhere")}, tmp_path, image=10, ocr=None)
    (tmp_path / "run").mkdir()
    lock = {"token": "t", "host": "node07", "namespace": "elsewhere", "pid": 4711, "process_start": None, "job": None}
    (tmp_path / "run/lock").write_text(json.dumps(lock | {"restart": 0, "since": 1.7e9, "beat": 9e9}))
    assert main(["train", str(path), "--check"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert f"data.sources.ocr: the shard set {tmp_path}/nowhere does not exist or is no folder" in lines[0]
    assert lines[1].startswith("objectives.image_labels.num_classes = 10 is smaller than the 11 classes of ")
    assert lines[2].startswith(f"run_dir = {tmp_path}/run is in use by process 4711 on node07")


def test_classes_that_nobody_has_are_a_warning(sources, tmp_path, capsys) -> None:
    assert main(["train", str(config_file(sources, tmp_path, image=40)), "--check"]) == 0
    output, warnings = capsys.readouterr()
    assert output == f"{tmp_path}/run\n" and len(warnings.splitlines()) == 1
    sentence = warnings.splitlines()[0]
    assert "objectives.image_labels.num_classes = 40, but " in sentence
    assert "has 11 classes, so 29 class centers (72%) would only ever be negatives; set it to 11, or leave" in sentence


def test_labels_that_name_every_class_are_refused(sources, tmp_path, capsys) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(sources["video"], folder)
    rows = np.load(folder / "index/rows.npy")
    rows["labels"][:, :7] = np.arange(7)
    np.save(folder / "index/rows.npy", rows)
    assert main(["train", str(config_file({**sources, "video": str(folder)}, tmp_path)), "--check"]) == 2
    sentence = f"each of the 14 samples of {folder} has all 7 classes among its labels, so there is no negative and"
    assert sentence in capsys.readouterr().err


def held_out_sentences(text: str) -> list[str]:
    """Returns what `train` says of `evaluation.sets`."""
    lines = [line for line in text.splitlines() if "evaluation.sets." in line]
    return [line[line.index("evaluation.sets.") :] for line in lines]


@pytest.mark.parametrize("starts", [False, True], ids=["check", "start"])
def test_held_out_sets_that_do_not_fit_are_refused(sources, tmp_path, starts) -> None:
    """By the check and by a start, all at once; a set with other classes would give figures that mean nothing."""
    data = tiny_config(sources, tmp_path / "run", train={"num_steps": 2}, optim={"schedule": {"warmup_steps": 0}})
    other = write_synthetic_shard_set(tmp_path / "other", kind="image", num_classes=9, num_samples=8)
    sets = {"image_labels": str(other), "ocr_labels": sources["image"], "video_labels": str(tmp_path / "nowhere")}
    data["evaluation"] = {"sets": sets}
    command = [sys.executable, "-m", "megatron_ove", "train", str(write_config(data, tmp_path / "config.yaml"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command + ["--check"] * (not starts), env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 2
    missing, classes, kind = held_out_sentences(result.stderr)
    assert missing.startswith(f"evaluation.sets.video_labels: the shard set {tmp_path}/nowhere does not exist")
    assert classes == (
        f"evaluation.sets.image_labels: {other} has 9 classes, but {sources['image']}, which objectives.image_labels "
        "trains on, has 11, so equal labels mean different things; write both sets with one vocabulary or clustering"
    )
    assert kind == (
        f"evaluation.sets.ocr_labels: {sources['image']} holds samples of kind image, but objectives.ocr_labels trains "
        f"on {sources['ocr']} of kind ocr, and they become patches in another way; name a set of kind ocr"
    )
    assert not (tmp_path / "run/config.resolved.yaml").exists()


def test_held_out_sets_with_other_words_or_without_labels_are_refused(sources, tmp_path, capsys) -> None:
    pages, held_out, clips = tmp_path / "pages", tmp_path / "held_out", tmp_path / "clips"
    for source, folder in ((sources["ocr"], pages), (sources["ocr"], held_out), (sources["video"], clips)):
        shutil.copytree(source, folder)
    write_tiny_vocabulary(pages)
    write_tiny_vocabulary(held_out, start="other")
    rows = np.load(clips / "index/rows.npy")
    rows["labels"] = -1
    np.save(clips / "index/rows.npy", rows)
    data = tiny_config({**sources, "ocr": str(pages)}, tmp_path / "run")
    data["evaluation"] = {"sets": {"ocr_labels": str(held_out), "video_labels": str(clips)}}
    path = str(write_config(data, tmp_path / "config.yaml"))
    assert main(["train", path, "--check"]) == 2
    words, labels = held_out_sentences(capsys.readouterr().err)
    assert (
        f"{held_out} has other words than {pages}, which objectives.ocr_labels trains on (class 0 is 'word0'" in words
    )
    assert "there and 'other0' here), so equal labels mean different things; write both sets with one voc" in words
    assert labels == (
        f"evaluation.sets.video_labels: no sample of {clips} has a label, so there is nothing to find; name a labelled "
        "set"
    )
    (held_out / "vocabulary.json").write_text("{}")
    assert main(["train", path, "--check"]) == 2
    words, _ = held_out_sentences(capsys.readouterr().err)
    assert words.startswith(f"evaluation.sets.ocr_labels: {held_out}/vocabulary.json is not a vocabulary")


def test_a_number_left_to_the_set_stands_in_the_resolved_configuration(sources, tmp_path, capsys) -> None:
    path = config_file(sources, tmp_path, image=None, ocr=None, video=None)
    command, environment = [sys.executable, "-m", "megatron_ove", "train"], {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(path)], env=environment, capture_output=True, check=True, timeout=240)
    resolved = yaml.safe_load((tmp_path / "run/config.resolved.yaml").read_text())
    for kind, count in NUM_CLASSES.items():
        assert resolved["objectives"][f"{kind}_labels"]["num_classes"] == count
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "11 classes x 64 = 704" in capsys.readouterr().out
    assert main(["train", str(config_file(sources, tmp_path, **NUM_CLASSES))]) == 0  # the same run: it is done
