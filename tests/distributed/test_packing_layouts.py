"""Packing changes no maths: the same losses for any token budget, with and without padding, on replicas and stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import run_distributed
from tests.support.tiny_run import check, tiny_config, write_tiny_sources

NUM_STEPS = 6
RELATIVE_TOLERANCE = 1e-5
"""fp32 sums in another order; see test_layout_grid.py."""
NATIVE = {"image_size": (28, 42, 56), "aspect": "keep", "max_upscale": 2.0}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "small_budget": (1, {"tokens_per_microbatch": 96}, {}),
    "replicas": (2, {"tokens_per_microbatch": 300}, {}),
    "stages": (2, {"tokens_per_microbatch": 300}, {"pipeline_model_parallel_size": 2}),
}


def train(rank: int, world_size: int, data: dict[str, Any]) -> None:
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    config = check(data)
    Trainer(config, initialize_topology(config.parallel, seed=config.seed)).run()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def rows(
    sources: dict[str, str], folder: Path, world_size: int, data: dict[str, Any], parallel: dict[str, Any]
) -> list[dict[str, float]]:
    config = tiny_config(
        sources,
        folder,
        parallel={"timeout_s": 60, **parallel},
        train={"num_steps": NUM_STEPS, "global_batch_size": 24, "precision": "fp32", "log_interval_steps": 1},
    )
    config["data"].update(data)
    config["data"]["sources"]["image"].update(NATIVE)
    config["data"]["sources"]["ocr"]["max_patches"] = (6, 16)
    config["data"]["sources"]["video"].update({"num_frames": (2, 4, 8), "max_patches": (8, 16)})
    run_distributed(train, world_size, config, timeout_s=100)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def padded(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """One rank, one microbatch a step, never cut."""
    data = {"tokens_per_microbatch": 512, "trim_padding": False}
    return rows(sources, tmp_path_factory.mktemp("padded"), 1, data, {})


@pytest.mark.parametrize("case", ["small_budget", "replicas", pytest.param("stages", marks=pytest.mark.full)])
def test_losses_do_not_depend_on_packing(
    sources: dict[str, str], padded: list[dict[str, float]], tmp_path: Path, case: str
) -> None:
    packed = rows(sources, tmp_path, *CASES[case])
    assert len(packed) == len(padded) == NUM_STEPS
    for row, expected in zip(packed, padded, strict=True):
        for name in (name for name in expected if name.split("/")[0] in ("loss", "grad_norm")):
            assert row[name] == pytest.approx(expected[name], rel=RELATIVE_TOLERANCE), name
        assert row["padding_share"] < expected["padding_share"]
    assert len({row["padding_share"] for row in packed}) > 1, "steps must differ for this test to mean anything"
