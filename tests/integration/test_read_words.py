"""The recipe that teaches reading, in a few steps: what it writes, and that it removes nothing of anybody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ove.config.loader import load_config

RECIPE = Path(__file__).parents[2] / "examples/read_words"
SETS = [f"{kind}_{faces}" for kind in ("strips", "pages") for faces in ("train", "siblings", "families")]


def run_recipe(*arguments: object, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE / "run.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


@pytest.mark.full
def test_a_tiny_run_from_pictures_to_figures(tmp_path: Path) -> None:
    result = run_recipe(
        "--tiny", "--seed", 3, "--control", "--json", tmp_path / "f.json", "--run-dir", tmp_path / "run"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "f.json").read_text())
    assert (record["seed"], record["control"], record["samples"]) == (3, True, 6 * 128)
    for stage in ("untrained", "trained"):
        assert sorted(record["figures"][stage]) == sorted(SETS)
        for figures in record["figures"][stage].values():
            assert figures["queries"] == 24 and 0 <= figures["first_right"] <= 1
            assert {"chance_first_right", "word_to_pages_mean_average_precision"} <= set(figures)
    assert [step for step, _ in record["curve"]["held_out"]] == [6]
    assert all(
        (tmp_path / "run" / name).stat().st_size > 1000
        for name in ("strips_siblings.png", "pages_siblings.png", "curve.png")
    )
    assert "strips_siblings" in result.stdout and "min in all" in result.stdout


def test_a_folder_of_something_else_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run_recipe("--json", tmp_path / "f.json", "--run-dir", tmp_path, timeout_s=60)
    assert result.returncode == 1
    assert "holds files that no earlier run of this recipe made; give another --run-dir" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_configuration_loads() -> None:
    config = load_config(RECIPE / "config.yaml")
    assert config.objectives["words"].centering == "embeddings"
    assert config.evaluation.sets == {"words": f"{config.run_dir}/data/strips_siblings"}
    most_tokens = config.train.global_batch_size // 2 * 64
    assert config.data.tokens_per_microbatch == most_tokens  # so that a step is one microbatch on each of two processes
