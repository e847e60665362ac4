"""`train --profile` as a user meets it: the files, what is in them, and losses that do not change."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import run_distributed
from tests.support.tiny_run import check, tiny_config, write_config, write_tiny_sources

NUM_STEPS = 5
PARALLEL = {"timeout_s": 60, "pipeline_model_parallel_size": 2}
OBJECTIVES = ("image_labels", "ocr_labels", "video_labels")


def train(rank: int, world_size: int, data: dict[str, Any]) -> None:
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    config = check(data)
    Trainer(config, initialize_topology(config.parallel, seed=config.seed)).run()


def config(sources: dict[str, str], run_dir: Path) -> dict[str, Any]:
    loop = {"num_steps": NUM_STEPS, "global_batch_size": 16, "precision": "fp32", "log_interval_steps": 1}
    return tiny_config(sources, run_dir, parallel=PARALLEL, train=loop)


def losses(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name.split("/")[0] in ("loss", "grad_norm")} for row in rows]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def profiled(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 2 and 3 of a run of two pipeline stages, both recorded; returns the run folder."""
    folder = tmp_path_factory.mktemp("profiled")
    path = write_config(config(sources, folder / "run"), folder / "config.yaml")
    command = [sys.executable, "-m", "megatron_ove", "train", str(path), "--nproc", "2", "--profile", "2:2"]
    command += ["--set", "profile.ranks=[0, 1]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"Wrote the profile of steps 2 to 3: {folder}/run/profile/rank0_steps2-3.*" in result.stderr
    return folder / "run"


def test_a_window_leaves_its_files_and_nothing_else(profiled: Path) -> None:
    endings = ("trace.json.gz", "operators.txt", "memory.json")
    expected = {f"rank{rank}_steps2-3.{ending}" for rank in (0, 1) for ending in endings}
    assert {path.name for path in (profiled / "profile").iterdir()} == expected
    for rank in (0, 1):
        table = (profiled / f"profile/rank{rank}_steps2-3.operators.txt").read_text()
        assert "Self CPU time total" in table and table.count("aten::") > 10


def read_ranges(run_dir: Path, rank: int) -> list[Mapping[str, Any]]:
    with gzip.open(run_dir / f"profile/rank{rank}_steps2-3.trace.json.gz", "rt") as stream:
        events = json.load(stream)["traceEvents"]
    return [event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith("ove/")]


def test_the_trace_names_steps_phases_and_objectives(profiled: Path) -> None:
    for rank in (0, 1):
        ranges = read_ranges(profiled, rank)
        names = {event["name"].removeprefix("ove/") for event in ranges}
        objectives = {f"objective {name}" for name in OBJECTIVES} | {f"objective {' + '.join(OBJECTIVES)}"}
        steps = {"step 2", "step 3"}
        assert names == {"data", "forward", "backward", "optimizer", "communication", "head"} | steps | (
            objectives if rank == 1 else set()
        )
        for number in (2, 3):
            (step,) = [event for event in ranges if event["name"] == f"ove/step {number}"]
            inside = [event for event in ranges if step["ts"] <= event["ts"] < step["ts"] + step["dur"]]
            assert {"ove/forward", "ove/backward", "ove/optimizer"} <= {event["name"] for event in inside}
    # The head's backward pass is a range inside `backward`, where the last stage has one for every forward pass.
    heads = [event for event in read_ranges(profiled, 1) if event["name"] == "ove/head"]
    backwards = [event for event in read_ranges(profiled, 1) if event["name"] == "ove/backward"]
    nested = [h for h in heads if any(b["ts"] <= h["ts"] < b["ts"] + b["dur"] for b in backwards)]
    assert len(nested) == len(backwards) > 0


def test_memory_is_told_by_phase(profiled: Path) -> None:
    content = json.loads((profiled / "profile/rank1_steps2-3.memory.json").read_text())
    assert content["process_peak_rss_mib"] > 100
    phases = content["phases"]
    assert {"forward", "backward", "head", "optimizer", "other"} <= set(phases)
    hidden, mlp, tokens = 64, 96, 48
    # Two layers in fp32 keep at least their queries, keys, values and the MLP's hidden layer of a microbatch.
    assert phases["forward"]["allocated_mib"] > 2 * 4 * tokens * (3 * hidden + mlp) / 2**20
    assert phases["forward"]["peak_held_mib"] >= phases["data"]["peak_held_mib"] >= 0


def test_profiling_changes_no_loss(profiled: Path, sources: dict[str, str], tmp_path: Path) -> None:
    run_distributed(train, 2, config(sources, tmp_path / "run"))
    assert not (tmp_path / "run/profile").exists()
    plain = losses(tmp_path / "run")
    assert len(plain) == NUM_STEPS
    assert losses(profiled) == plain
