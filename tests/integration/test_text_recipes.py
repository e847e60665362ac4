"""The recipes about decoders and reconstruction, in a few steps; and that they remove nothing of anybody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ove.config.loader import load_config
from tests.support.recipes import EXAMPLES, load_script

RECIPES = ("unit_small", "progressive", "pretrained_decoder")


def run_recipe(name: str, *arguments: object, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name / "run.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_tiny_unit_small_measures_every_arm(tmp_path: Path) -> None:
    result = run_recipe(
        "unit_small", "--tiny", "--json", tmp_path / "f.json", "--run-dir", tmp_path / "run", timeout_s=500
    )
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert list(figures) == ["untrained", "concepts", "text_only", "captions", "unit"]
    assert all(0 <= row["neighbour"] <= 1 for row in figures.values())
    assert all(row["character_error_rate"] > 0.3 for name, row in figures.items() if "kept" in row)
    summary = run_recipe("unit_small", "--summary", tmp_path / "f.json", tmp_path / "f.json")
    assert summary.returncode == 0 and "+- 0.000" in summary.stdout


def test_composed_pictures_follow_from_seed_and_number() -> None:
    composed = load_script("unit_small/composed.py")
    made = [composed.compose(1, number) for number in range(30)]
    again = composed.compose(1, 7)
    assert (again.pixels == made[7].pixels).all() and again.captions == made[7].captions
    assert (composed.compose(2, 7).pixels != made[7].pixels).any()
    assert all(
        one.pixels.shape == (composed.SIDE, composed.SIDE, 3) and 0 <= one.concept < composed.NUM_CONCEPTS
        for one in made
    )
    things = {one.captions[0].split()[0] for one in made}
    assert len(things) > 5 and all(one.captions[1].split()[0] == one.captions[0].split()[0] for one in made)


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_what_they_need_or_in_a_folder_of_something_else_nothing_happens(recipe: str, tmp_path: Path) -> None:
    needs = {"progressive": ["--data"], "pretrained_decoder": ["--decoder", "--encoder"], "unit_small": []}[recipe]
    there = tmp_path / "there"
    there.mkdir()
    (there / "thesis.txt").write_text("years of work")
    for option in needs:
        given = [part for one in needs for part in (one, there if one != option else tmp_path / "nothing")]
        result = run_recipe(recipe, "--json", tmp_path / "f.json", *given, "--run-dir", tmp_path / "run", timeout_s=60)
        assert result.returncode == 1 and "does not exist; " in result.stderr
    given = [part for one in needs for part in (one, there)]
    result = run_recipe(recipe, "--json", tmp_path / "f.json", *given, "--run-dir", there, timeout_s=60)
    assert result.returncode == 1 and "holds files that no earlier run of this recipe made" in result.stderr
    assert (there / "thesis.txt").read_text() == "years of work" and not (tmp_path / "f.json").exists()


@pytest.mark.parametrize(
    "path",
    [
        *(f"unit_small/{name}.yaml" for name in ("concepts", "text_only", "captions", "unit")),
        *(f"pretrained_decoder/{name}.yaml" for name in ("config", "from_scratch")),
        *(f"progressive/{name}.yaml" for name in ("small_low", "small_high")),
    ],
)
def test_every_configuration_loads(path: str) -> None:
    config = load_config(EXAMPLES / path)
    assert config.run_dir.startswith(f"runs/{path.split('/', maxsplit=1)[0]}/")


def test_lines_held_out_are_of_other_chapters() -> None:
    lines = load_script("pretrained_decoder/run.py").draw_lines()
    assert len(lines["train"]) > 4000 and len(lines["held_out"]) > 300
    assert not set(lines["train"]) & set(lines["held_out"])
    assert all(24 <= len(line) <= 32 for part in lines.values() for line in part)
