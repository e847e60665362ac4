"""`make clean` is a reflex, so it must not cost anybody a trained model."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, a trained run, and what the targets of the Makefile leave behind."""
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("stage1_image/checkpoints/step_00000100", "quickstart", "gpu/site", "benchmark"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs/gpu/bench.json").write_text("{}")
    (tmp_path / "runs/quickstart/made_by_the_quick_start").touch()
    (tmp_path / "build").mkdir()
    return tmp_path


def make(folder: Path, *arguments: str) -> str:
    command = ["make", "-C", str(folder), "PYTHON=python3", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def folders(checkout: Path) -> set[str]:
    return {path.relative_to(checkout).as_posix() for path in checkout.glob("runs/*")}


def test_clean_keeps_trained_runs(checkout: Path) -> None:
    make(checkout, "clean")
    assert folders(checkout) == {"runs/stage1_image", "runs/gpu"}
    assert (checkout / "runs/gpu/bench.json").exists() and not (checkout / "runs/gpu/site").exists()
    assert (checkout / "runs/stage1_image/checkpoints/step_00000100").is_dir()
    assert not (checkout / "build").exists()


def test_clean_keeps_a_folder_of_that_name_which_the_quick_start_did_not_make(checkout: Path) -> None:
    (checkout / "runs/quickstart/made_by_the_quick_start").unlink()
    make(checkout, "clean")
    assert "runs/quickstart" in folders(checkout)


def test_runs_are_listed_and_go_only_when_that_is_confirmed(checkout: Path) -> None:
    assert "runs/stage1_image" in make(checkout, "clean-runs")
    assert folders(checkout) == {f"runs/{name}" for name in ("stage1_image", "quickstart", "gpu", "benchmark")}
    make(checkout, "clean-runs", "CONFIRM=1")
    assert not (checkout / "runs").exists()
    assert "runs/ holds nothing" in make(checkout, "clean-runs")
