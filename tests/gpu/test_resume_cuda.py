"""A run on a GPU that is cut and resumed equals an uninterrupted one to the bit, with `train.deterministic`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the run's loader needs DALI")

from megatron_ove.checkpoint.manager import list_checkpoints
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.parallel.topology import destroy_topology, initialize_topology
from tests.support.tiny_run import tiny_config, write_config, write_tiny_sources

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
COMPARED = ("step", "loss", "grad_norm")


def launch(data: dict[str, Any], path: Path) -> None:
    command = [sys.executable, "-m", "megatron_ove", "train", str(write_config(data, path))]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr[-3000:]


def run(tmp_path: Path, sources: dict[str, str], name: str, launches: list[int | None]) -> Path:
    run_dir = tmp_path / name
    for stop in launches:
        train = {"num_steps": 6, "global_batch_size": 8, "precision": "bf16", "log_interval_steps": 1}
        train |= {"deterministic": True, "stop_after_steps": stop}
        data = tiny_config(sources, run_dir, sample_rate=0.5, parallel={"device": DEVICE}, train=train)
        launch(data, tmp_path / f"{name}.yaml")
    return run_dir


def test_cut_run_is_bit_equal(tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    sources = write_tiny_sources(tmp_path / "sources")
    whole, cut = run(tmp_path, sources, "whole", [None]), run(tmp_path, sources, "cut", [3, None])
    metrics = [
        [{name: row[name] for name in COMPARED} for row in map(json.loads, (folder / "metrics.jsonl").open())]
        for folder in (whole, cut)
    ]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 6
    initialize_topology(ParallelConfig(device=DEVICE), seed=0)
    newest = [max(list_checkpoints(folder / "checkpoints"))[1] for folder in (whole, cut)]
    states = [dist_checkpointing.load_plain_tensors(str(path)) for path in newest]
    destroy_topology()
    tensors = [{name: value for name, value in state.items() if torch.is_tensor(value)} for state in states]
    assert tensors[0].keys() == tensors[1].keys()
    assert [name for name, value in tensors[0].items() if not torch.equal(value, tensors[1][name])] == []
