"""The recipe that teaches writing, in a few steps, from an encoder that starts with random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ove.config.loader import load_config
from tests.integration.test_read_words import RECIPE as READ_WORDS
from tests.support.recipes import load_script

RECIPE = Path(__file__).parents[2] / "examples/read_lines"


def run_recipe(*arguments: object, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE / "run.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_tiny_run_from_strips_to_figures(tmp_path: Path) -> None:
    words = [sys.executable, str(READ_WORDS / "run.py"), "--tiny", "--json", str(tmp_path / "words.json")]
    assert not subprocess.run([*words, "--run-dir", str(tmp_path / "words")], timeout=280, check=False).returncode
    given = ("--encoder", tmp_path / "words", "--run-dir", tmp_path / "run", "--json", tmp_path / "f.json")
    result = run_recipe("--tiny", "--seed", 3, "--control", *given)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "f.json").read_text())
    assert (record["seed"], record["control"], record["samples"]) == (3, True, 6 * 128)
    sets = ["seen_words", "unseen_words", "unseen_words_siblings", "unseen_words_families", "scrambled"]
    assert list(record["figures"]) == sets
    assert all(figures["character_error_rate"] > 0.3 for figures in record["figures"].values())
    assert [step for step, _ in record["curve"]["held_out"]] == [6]
    assert (tmp_path / "run/curve.png").stat().st_size > 1000 and "min in all" in result.stdout


def test_without_an_encoder_or_in_a_folder_of_something_else_nothing_happens(tmp_path: Path) -> None:
    result = run_recipe("--json", tmp_path / "f.json", "--encoder", tmp_path / "nothing", timeout_s=60)
    assert result.returncode == 1 and "does not exist; make it first (examples/read_words/run.py" in result.stderr
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run_recipe("--json", tmp_path / "f.json", "--encoder", tmp_path, "--run-dir", tmp_path, timeout_s=60)
    assert result.returncode == 1 and (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_configuration_loads_and_holds_words_out() -> None:
    config = load_config(RECIPE / "config.yaml")
    assert config.evaluation.sets == {"read": f"{config.run_dir}/data/unseen_words"}
    words = load_script("read_lines/run.py").draw_words(500)
    assert [len(words[name]) for name in ("words", "unseen", "scrambled")] == [7970, 500, 500]
    assert len(words["train"]) > 30_000 and set(words["words"]) < set(words["train"])
    assert not (set(words["unseen"]) | set(words["scrambled"])) & set(words["train"])
    originals = {"".join(sorted(word)) for word in words["words"]}
    assert all("".join(sorted(word)) in originals for word in words["scrambled"])
