"""Two launches into one run folder, by the command line: the second ends before it changes anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_ove.training.run_lock import LockHolder
from tests.support.tiny_run import tiny_config, write_config, write_tiny_sources

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def endless(sources: dict[str, str], folder: Path) -> Path:
    data = tiny_config(sources, folder / "run", train={"num_steps": 100_000, "log_interval_steps": 1})
    data["checkpoint"] = {"interval_steps": 2, "keep": 2}
    return write_config(data, folder / "config.yaml")


@contextmanager
def running(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A launch that has written its first rows."""
    command = [sys.executable, "-m", "megatron_ove", "train", str(path)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = path.parent / "run/metrics.jsonl"
    try:
        deadline = time.monotonic() + 200
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_ove", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("options", [(), ("--nproc", "2"), ("--check",)], ids=["one", "two", "check"])
def test_a_folder_in_use_is_left_alone(sources, tmp_path, options):
    path, run_dir = endless(sources, tmp_path), tmp_path / "run"
    run_dir.mkdir()
    elsewhere = replace(LockHolder.of_this_process(), host="node07", namespace="elsewhere", pid=4711, job="78")
    (run_dir / "lock").write_text(json.dumps(asdict(elsewhere)))
    for name in ("console.log", "config.resolved.yaml", "stop", "metrics.jsonl"):
        (run_dir / name).write_text("of the other launch")
    (run_dir / "checkpoints").mkdir()
    before = {file.name: file.read_bytes() for file in run_dir.iterdir() if file.is_file()}
    result = call("train", str(path), *options)
    assert result.returncode == 2
    sentence = f"run_dir = {run_dir} is in use by process 4711 on node07 of SLURM job 78, since "
    assert result.stderr.count(sentence) == 1 and "Traceback" not in result.stderr
    assert {file.name: file.read_bytes() for file in run_dir.iterdir() if file.is_file()} == before


def test_a_second_launch_leaves_the_first_one_to_train(sources, tmp_path):
    path, run_dir = endless(sources, tmp_path), tmp_path / "run"
    with running(path) as first:
        second = call("train", str(path))
        assert second.returncode == 2
        assert f"is in use by process {first.pid} on " in second.stderr
        assert first.poll() is None
        first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=100)
        assert first.returncode == 0 and "Stopped after step" in errors
    steps = [json.loads(row)["step"] for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert not (run_dir / "lock").exists()


def test_a_launch_that_was_taken_over_saves_no_more(sources, tmp_path):
    path, run_dir = endless(sources, tmp_path), tmp_path / "run"
    with running(path) as first:
        other = replace(LockHolder.of_this_process(), token="other", host="node07")
        (run_dir / "taken").write_text(json.dumps(asdict(other)))
        (run_dir / "taken").replace(run_dir / "lock")
        _, errors = first.communicate(timeout=100)
    assert first.returncode == 2
    assert f"the run folder {run_dir} was taken over by another launch (process {os.getpid()} on node07" in errors
    assert json.loads((run_dir / "lock").read_text())["token"] == "other"
    newest = max(int(folder.name.removeprefix("step_")) for folder in (run_dir / "checkpoints").iterdir())
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert last == newest + 2, "it stopped where it would have saved"
