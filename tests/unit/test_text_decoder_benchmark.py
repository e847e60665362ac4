"""The benchmark of the text decoder: contenders compute the same, and the command runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.tool_scripts import run_script

sys.path.append(str(Path(__file__).parents[2] / "tools/benchmark"))

TINY = (
    *("--encoder-layers", 1, "--resolution", 28, "--pictures", 2, "--hidden", 64, "--decoder-layers", 1),
    *("--vocabulary", 500, "--rows", 30, "--loss-hidden", 16, "--loss-vocabulary", 700, "--threads", 1, "--repeats", 2),
)


@pytest.mark.full
def test_the_command_compares_and_writes_its_figures(tmp_path: Path) -> None:
    assert run_script("benchmark/text_decoder.py", *TINY, "--json", tmp_path / "figures.json") == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["reading"]["time_of_plain"] > 0 and set(found["reading"]["contenders"]) == {"ours", "plain"}
    assert set(found["loss"]["bytes_beyond_weights_and_gradients"]) == {"chunks", "logits"}
