"""A cut run continues as if nothing had happened: 4 steps = 2 + resume 2, to the bit; and across kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ove.data.synthetic import write_synthetic_shard_set
from tests.support.distributed import run_distributed
from tests.support.tiny_run import NUM_CLASSES, check, tiny_config, write_config, write_tiny_sources

LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one_process": (1, {}, "fp32"),
    "bf16_tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "bf16"),
    "bf16_dp2_distributed_optimizer": (2, {"use_distributed_optimizer": True}, "bf16"),
    "pp2_vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, "fp32"),
}
# What depends on the clock, not on the run.
TIMINGS = {"time", "samples_per_s", "tokens_per_s", "data_wait_share", "step_time_s", "tflops_per_device"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def train(rank: int, world_size: int, data: dict[str, Any]) -> list[list[str]]:
    """Trains one launch; returns the sample keys of every step it ran."""
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    config = check(data)
    trainer = Trainer(config, initialize_topology(config.parallel, seed=config.seed))
    keys, load_step = [], trainer.loader.load_step

    def recorded(step: int):
        loaded = load_step(step)
        keys.append([key for batch in loaded.batches for key in batch.samples.keys])
        return loaded

    trainer.loader.load_step = recorded  # type: ignore[method-assign]
    trainer.run()
    return keys


def read_tensors(rank: int, world_size: int, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns every tensor of a checkpoint, whole, and its plain values."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_ove.checkpoint.manager import read_common_state
    from megatron_ove.parallel import cpu_backend

    cpu_backend.install()
    content = dist_checkpointing.load_plain_tensors(folder)
    return {name: value for name, value in content.items() if torch.is_tensor(value)}, read_common_state(folder)


def is_timing(name: str) -> bool:
    return name in TIMINGS or name.startswith("phase_")


def rows(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if not is_timing(name)} for line in lines]


def assert_equal_checkpoints(first: Path, second: Path) -> None:
    import torch

    (tensors, common), (other_tensors, other_common) = (
        run_distributed(read_tensors, 1, str(folder))[0] for folder in (first, second)
    )
    assert tensors.keys() == other_tensors.keys()
    prefixes = {name.split(".")[0] for name in tensors}
    assert prefixes == {"model", "optimizer", "objectives"}
    for part in ("weight", "exp_avg_sq", "steps", "norms"):
        assert f"objectives.ocr_labels.{part}" in tensors
    assert any(name.startswith("optimizer.state.exp_avg_sq.model.") for name in tensors)
    unequal = [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])]
    assert unequal == []
    for name in ("step", "train_state", "sampler", "layout"):
        assert common[name] == other_common[name]
    assert repr(common["optimizer"]) == repr(other_common["optimizer"])  # step count and group settings


def config(sources: dict[str, str], run_dir: Path, parallel: dict[str, Any], precision: str, **train: Any) -> dict:
    return tiny_config(
        sources,
        run_dir,
        sample_rate=0.5,
        parallel={"timeout_s": 60, **parallel},
        train={
            "num_steps": 4,
            "global_batch_size": 8,
            "precision": precision,
            "log_interval_steps": 1,
            **train,
        },
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_steps_are_two_and_two_more(sources, tmp_path, layout):
    world_size, parallel, precision = LAYOUTS[layout]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    keys = run_distributed(train, world_size, config(sources, whole, parallel, precision))
    first = run_distributed(train, world_size, config(sources, cut, parallel, precision, stop_after_steps=2))
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step_00000002"]
    assert len(rows(cut)) == 2
    second = run_distributed(train, world_size, config(sources, cut, parallel, precision))
    assert keys == [before + after for before, after in zip(first, second, strict=True)]
    assert rows(cut) == rows(whole)
    assert_equal_checkpoints(whole / "checkpoints/step_00000004", cut / "checkpoints/step_00000004")


def test_a_run_continues_under_another_layout(sources, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run_dir, stop in ((whole, None), (cut, 2)):
        data = tiny_config(sources, run_dir)
        data["train"] |= {"num_steps": 5, "stop_after_steps": stop}
        run_distributed(train, 1, data)
    data = tiny_config(sources, cut, parallel={"timeout_s": 60, "tensor_model_parallel_size": 2})
    data["train"] |= {"num_steps": 5}
    run_distributed(train, 2, data)
    for row, expected in zip(rows(cut), rows(whole), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_run_continues_from_its_untrained_checkpoint(sources, tmp_path):
    data = config(sources, tmp_path / "run", {}, "bf16")
    data["checkpoint"] = {"interval_steps": 100, "save_initial": True, "keep": 1}
    run_distributed(train, 1, data)
    expected = rows(tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000000", "step_00000004"]
    (folder / "step_00000004").rename(tmp_path / "moved")
    run_distributed(train, 1, data)
    assert rows(tmp_path / "run") == expected
    assert_equal_checkpoints(tmp_path / "moved", folder / "step_00000004")


def train_and_listen(rank: int, world_size: int, data: dict[str, Any]) -> list[str]:
    import logging

    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("megatron_ove").addHandler(handler)
    train(rank, world_size, data)
    return messages


def test_a_shard_set_that_has_grown_is_noticed(sources, tmp_path):
    data = config(sources, tmp_path / "run", {}, "fp32")
    assert run_distributed(train_and_listen, 1, {**data, "train": {**data["train"], "stop_after_steps": 1}}) == [[]]
    grown = tmp_path / "grown"
    write_synthetic_shard_set(grown, kind="image", num_classes=NUM_CLASSES["image"], num_samples=25)
    data["data"]["sources"]["image"]["path"] = str(grown)
    ((moved, size),) = run_distributed(train_and_listen, 1, data)
    assert moved.startswith("data.sources.image.path was ")
    assert size.startswith(
        "data.sources.image had 24 samples when the checkpoint was saved and has 25 now, so from here"
    )


def command(path: Path) -> list[str]:
    return [sys.executable, "-m", "megatron_ove", "train", str(path)]


def wait_for_rows(run_dir: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    path = run_dir / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, "the run is too slow"
        time.sleep(0.01)


def test_a_run_killed_between_two_saves_ends_as_if_it_had_not_been(sources, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    paths = {}
    for name in ("whole", "killed"):
        data = config(sources, tmp_path / name, {}, "fp32", num_steps=24)
        data["checkpoint"] = {"interval_steps": 6}
        paths[name] = write_config(data, tmp_path / f"{name}.yaml")
    whole = subprocess.Popen(command(paths["whole"]), env=environment, stdout=subprocess.DEVNULL)
    killed = subprocess.Popen(command(paths["killed"]), env=environment, stdout=subprocess.DEVNULL, process_group=0)
    try:
        wait_for_rows(tmp_path / "killed", 8, killed)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait(10)
        logged = len(rows(tmp_path / "killed"))
        saved = sorted(path.name for path in (tmp_path / "killed/checkpoints").iterdir())
        assert "step_00000006" in saved and "step_00000024" not in saved
        assert logged > 6
        again = subprocess.run(command(paths["killed"]), env=environment, timeout=240, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert "Resumed from" in again.stderr
        assert whole.wait(240) == 0
    finally:
        for process in (whole, killed):
            process.kill()
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, 25))
    last = "checkpoints/step_00000024"
    assert_equal_checkpoints(tmp_path / "whole" / last, tmp_path / "killed" / last)
