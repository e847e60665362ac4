"""Mistakes a user makes on the command line: one sentence that says what is wrong, status 2, never a traceback."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from megatron_ove.cli.main import main
from megatron_ove.data.build import open_shard_sets
from megatron_ove.errors import DataError, file_system_sentence
from megatron_ove.preprocess.tool_arguments import run_tool
from tests.support.tiny_run import check, tiny_config, write_config, write_tiny_sources

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SHORT = {"train": {"num_steps": 2}, "optim": {"schedule": {"warmup_steps": 0}}}


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_ove", *arguments]
    return subprocess.run(
        command, env={**ENVIRONMENT, **environment}, timeout=120, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def config(sources: dict[str, str], tmp_path: Path) -> Path:
    return write_config(tiny_config(sources, tmp_path / "run", **SHORT), tmp_path / "config.yaml")


@pytest.fixture(scope="module")
def trained(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2 steps with a checkpoint after each; returns its folder, which holds config.yaml as well."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny_config(sources, folder / "run", **SHORT, checkpoint={"interval_steps": 1})
    path = write_config(data, folder / "config.yaml")
    assert call("train", str(path)).returncode == 0
    return folder


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "{d}/none"], "{d}/none does not exist, so there is nothing to describe; check the path"),
        (["report", "{d}/none"], "{d}/none/metrics.jsonl does not exist, so there is nothing to report; give the"),
        (
            ["convert", "export", "--checkpoint", "{d}/none", "--output", "{d}/out"],
            "{d}/none cannot be used as a checkpoint: there is no such folder; name a finished folder like",
        ),
        (
            ["convert", "export", "--checkpoint", "{s}", "--output", "{d}/out"],
            "{s} cannot be used as a checkpoint: it has no manifest.json, which is written last and deleted first; "
            "name a finished",
        ),
        (
            ["convert", "import", "--source", "{s}", "--output", "{d}/out"],
            "{s} holds no config.json, so it is not a HuggingFace model; name a folder made by save_pretrained",
        ),
        (["evaluate", "--model", "{d}/none", "--shards", "{d}/no"], "the shard set {d}/no does not exist or is no fol"),
        (["evaluate", "--model", "{d}/none", "--shards", "{s}"], "{d}/none is not an exported model, because it holds"),
        (["evaluate", "--model", "x", "--shards", "{s}", "--k", "0"], "--k 0 looks at nothing; give at least 1"),
        (["evaluate", "--model", "x", "--shards", "{s}", "--device", "gpu"], "--device gpu cannot be used (Expected o"),
        (
            ["evaluate", "--model", "x", "--shards", "{s}", "--output", "{d}/no/f.json"],
            "--output {d}/no/f.json lies in a folder that does not exist; make it first",
        ),
        (["train", "{d}/none.yaml"], "cannot read the configuration {d}/none.yaml: No such file or directory; check"),
        (["train", "{c}", "--nproc", "0"], "--nproc 0 starts no process; give at least 1"),
        (["train", "{c}", "--set", "seed=99999999999999999999"], "{c} has 1 error:\n  - seed = 99999999999999999999"),
        (["train", "{c}", "--set", "optim.learning_rat=1"], "{c} has 1 error:\n  - unknown key 'optim.learning_rat'"),
        (
            ["train", "{c}", "--set", "run_dir={c}"],
            "run_dir = {c} cannot be written (Not a directory: {c}/checkpoints)",
        ),
    ],
)
def test_a_wrong_argument_is_a_sentence(
    sources: dict[str, str],
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    names = {"d": tmp_path, "s": sources["image"], "c": config}
    assert main([argument.format(**names) for argument in arguments]) == 2
    first = capsys.readouterr().err
    assert first.startswith("megatron-ove: " + sentence.format(**names))


def test_a_place_in_the_world_that_is_no_number(config: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "first")
    assert main(["train", str(config)]) == 2
    assert capsys.readouterr().err.startswith("megatron-ove: the environment has RANK = 'first', which is no number")


def test_three_processes_for_tensor_parallel_two(config: Path) -> None:
    result = call("train", str(config), "--nproc", "3", "--set", "parallel.tensor_model_parallel_size=2")
    assert result.returncode == 2
    sentence = (
        "megatron-ove: [rank 0] world size 3 is not divisible by tensor_model_parallel_size x "
        "pipeline_model_parallel_size = 2 x 1 = 2, so some processes would belong to no model replica; start 2 or 4 "
        "processes or change the sizes"
    )
    assert result.stderr.count("[rank 0] world size 3") == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut(folder: Path) -> None:
    (shard,) = (folder / "shards").glob("*.tar")
    os.truncate(shard, 5000)


def shift(folder: Path) -> None:
    rows = np.load(folder / "index" / "rows.npy")
    rows["offset"] += 512
    np.save(folder / "index" / "rows.npy", rows)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove, "data.sources.ocr: the shard set {d} does not exist or is no folder; check the source's path"),
        (empty, "data.sources.ocr: {d} is not a shard set, because it holds no dataset.json; give the folder"),
        (cut, "data.sources.ocr: the shard {d}/shards/000000.tar is truncated: it has 5000 bytes, but its last sampl"),
        (shift, "data.sources.ocr: the index of {d} does not match its shard 000000.tar: it places ocr000000.jpg"),
    ],
)
def test_a_damaged_shard_set_is_named_with_its_source(
    sources: dict[str, str], tmp_path: Path, damage, sentence
) -> None:
    folder = tmp_path / "p\u00e4ges [1] e"  # names with spaces, brackets and letters of any language are fine
    shutil.copytree(sources["ocr"], folder)
    damage(folder)
    with pytest.raises(DataError) as caught:
        open_shard_sets(check(tiny_config({**sources, "ocr": str(folder)}, tmp_path / "run")))
    assert str(caught.value).startswith(sentence.format(d=folder))


def test_training_on_a_truncated_shard(sources: dict[str, str], config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    shutil.copytree(sources["ocr"], folder)
    cut(folder)
    result = call("train", str(config), "--set", f"data.sources.ocr.path={folder}")
    assert result.returncode == 2
    sentence = f"megatron-ove: data.sources.ocr: the shard {folder}/shards/000000.tar is truncated: it has 5000 bytes,"
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_a_flipped_bit_in_the_newest_checkpoint_continues_from_the_one_before(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained / "run", run_dir)
    flip_bit(run_dir / "checkpoints/step_00000002/__0_0.distcp")
    result = call("train", str(trained / "config.yaml"), "--set", f"run_dir={run_dir}")
    assert result.returncode == 0, result.stderr
    assert (
        f"Skipping checkpoint {run_dir}/checkpoints/step_00000002: its file __0_0.distcp has the checksum "
        in result.stderr
    )
    assert ": the content has changed; looking for an older one." in result.stderr
    assert f"Resumed from {run_dir}/checkpoints/step_00000001 at step 1." in result.stderr
    assert "All 2 steps are done." in result.stderr


def test_only_damaged_checkpoints_never_start_a_run_anew(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained / "run", run_dir)
    for folder in (run_dir / "checkpoints").iterdir():
        flip_bit(folder / "common.pt")
    result = call("train", str(trained / "config.yaml"), "--set", f"run_dir={run_dir}")
    assert result.returncode == 2
    assert f"megatron-ove: none of the 2 checkpoints in {run_dir}/checkpoints can be used" in result.stderr
    assert "starting again from step 0 would lose the run; repair the folder, or move it away" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_full_disk_while_training_saves_is_a_sentence_and_keeps_what_was_saved(trained: Path, tmp_path: Path) -> None:
    """A checkpoint has 2.6 MB and 4 MiB are kept in reserve, so this disk takes the first and not the second."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8500k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        result = call("train", str(trained / "config.yaml"), "--set", f"run_dir={tmp_path}/run")
        kept = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert result.returncode == 2
    assert f"megatron-ove: cannot save the checkpoint of step 2 to {tmp_path}/run/checkpoints: " in result.stderr
    assert "free some space or lower checkpoint.keep" in result.stderr
    assert "Traceback" not in result.stderr
    assert kept == ["step_00000001"]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EACCES, "/data/x cannot be used (Permission denied); check its permissions"),
        (errno.ENOSPC, "/data/x cannot be used (No space left on device); free some space or use another disk"),
        (errno.EISDIR, "/data/x cannot be used (Is a directory); check the path"),
        (errno.EROFS, "/data/x cannot be used (Read-only file system); choose a folder where you may write"),
        (errno.ECHILD, None),
    ],
)
def test_errors_of_the_file_system(number: int, sentence: str | None, capsys) -> None:
    error = OSError(number, os.strerror(number), "/data/x")
    assert file_system_sentence(error) == sentence

    def work(arguments: Namespace) -> None:
        raise error

    if sentence is None:
        with pytest.raises(OSError, match="No child"):
            run_tool(work, Namespace())
    else:
        assert run_tool(work, Namespace()) == 2
        assert capsys.readouterr().err == f"error: {sentence}\n"


def test_the_command_line_explains_errors_of_the_file_system(tmp_path: Path, capsys) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupted_tool_says_so(capsys) -> None:
    def work(arguments: Namespace) -> None:
        raise KeyboardInterrupt

    assert run_tool(work, Namespace()) == 130
    assert capsys.readouterr().err.startswith("error: interrupted; what is finished is kept")
