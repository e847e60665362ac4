"""The quick start on real files of a user: photographs, scans and signs, and clips of several codecs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared/samples"


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample files beside the repository")
def test_demo_preprocesses_and_trains_on_real_files(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    folders = ["--images", SAMPLES / "images", "--pages", SAMPLES / "images", "--videos", SAMPLES / "videos"]
    command = [sys.executable, ROOT / "examples/quickstart/demo.py", "--size", "tiny", "--run-dir", run_dir, *folders]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["data"]["images"]["train"] + summary["data"]["images"]["held_out"] == 13
    assert summary["data"]["clips"]["train"] >= 5
    assert all(head["last_loss"] < head["first_loss"] for head in summary["heads"].values())
    assert summary["export_difference"] <= 1e-5
    reasons = [json.loads(line) for line in (run_dir / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("skimage_coffee.png" in reject["file"] for reject in reasons), "a page without text is rejected"
    assert sum(summary["rejects"].values()) == len(reasons)
