"""The benchmark of the heads' work on the host runs, and finds the active rows exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools/benchmark/host_work.py"


@pytest.mark.parametrize("co_positives", ["masked", "negative"])
def test_a_few_simulated_replicas(tmp_path: Path, co_positives: str) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--replicas", "70", "--steps", "1", "--co-positives", co_positives, "--json", str(figures)]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True)
    (result,) = json.loads(figures.read_text())
    assert result["rows_are_exact"] and result["heads"] == 3 and result["samples_of_a_head"] == 70 * 16
    assert result["critical_path_ms"] > 0 and result["ahead_in_thread_ms"] > 0
    assert result["active_rows"]["images_head"] < result["rows_of_shard"]["images_head"]
    assert "| 70 | 1,120 |" in done.stdout and "exactly those of the definition" in done.stdout
