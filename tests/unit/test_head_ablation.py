"""The head ablation: its statistics, its data, that its figures come from training, and that finished runs are kept."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "tools/benchmark"
VARIANTS = ("published", "default", "shared")


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    """The script, imported as Python does when it is run: its folder first on the path."""
    sys.path.insert(0, str(FOLDER))
    try:
        import head_ablation

        return head_ablation
    finally:
        sys.path.remove(str(FOLDER))


STEPS = 8
"""Enough for figures and files; to learn something takes ten times as many."""


def arguments(folder: Path, *more: str, steps: int = STEPS) -> list[str]:
    common = f"--variants {' '.join(VARIANTS)} --classes 200 --seeds 2 --steps {steps} --batch-size 32".split()
    return [*common, "--json", str(folder / "runs.json"), *more]


@pytest.fixture(scope="module")
def finished(ablation: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    files = ["--markdown", str(folder / "table.md"), "--plot", str(folder / "plot.png")]
    assert ablation.main(arguments(folder, "--equal-time", "published", *files)) == 0
    return folder


def runs_of(folder: Path) -> list[dict]:
    return json.loads((folder / "runs.json").read_text())["runs"]


def test_t_interval_of_a_known_example(ablation: ModuleType) -> None:
    from ablation_statistics import interval, paired_difference

    # Mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776445.
    known = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert known.mean == 3 and known.half_width == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert math.isnan(interval([1.0]).half_width)
    # Pairs: differences 1 and 3 of the seeds in common; t(0.975, 1) = 12.706205.
    paired = paired_difference({0: 2.0, 1: 5.0, 7: 100.0}, {1: 2.0, 0: 1.0, 2: -100.0})
    assert paired.mean == 2 and paired.half_width == pytest.approx(12.706205, rel=1e-6)
    assert paired.verdict == "equal"
    assert interval([1.0, 1.1, 0.9]).verdict == "better" and interval([-1.0, -1.1, -0.9]).verdict == "worse"


@pytest.mark.full
def test_every_variant_learns(ablation: ModuleType, tmp_path: Path) -> None:
    assert ablation.main(arguments(tmp_path, steps=120)) == 0
    for run in runs_of(tmp_path):
        before, after = run["points"][0]["figures"], run["points"][-1]["figures"]
        assert after["top1"] > before["top1"] + 0.01, run["key"]
        assert after["recall"] > before["recall"] + 0.2, run["key"]
        assert run["points"][-1]["samples"] == run["steps"] * 32


def test_variants_differ_and_seeds_are_paired(finished: Path) -> None:
    runs = [run for run in runs_of(finished) if run["key"]["budget"] == "samples"]
    assert {(run["variant"], run["key"]["seed"]) for run in runs} == {(v, s) for v in VARIANTS for s in (0, 1)}
    for seed in (0, 1):
        chosen = [run for run in runs if run["key"]["seed"] == seed]
        untrained = {run["points"][0]["figures"]["top1"] for run in chosen}
        assert len(untrained) == 1  # same data, same initial encoder
        assert len({run["points"][-1]["figures"]["recall"] for run in chosen}) == len(VARIANTS)


def test_finished_runs_are_not_repeated(ablation: ModuleType, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = runs_of(finished)
    monkeypatch.setattr(ablation, "train", lambda *_: pytest.fail("a finished run was repeated"))
    assert ablation.main(arguments(finished)) == 0
    assert runs_of(finished) == before


def test_a_run_made_with_other_defaults_is_repeated(ablation: ModuleType, finished: Path) -> None:
    from ablation_runs import RunFile

    file = RunFile(finished / "runs.json")
    run = next(run for run in file.runs if run.variant == "default")
    assert file.find(run.key, run.settings) == run
    assert file.find(run.key, {**run.settings, "optim": {}}) is None


def test_equal_time_gives_the_steps_that_fit(ablation: ModuleType, finished: Path) -> None:
    from ablation_runs import RunFile, median_seconds

    runs = RunFile(finished / "runs.json").runs
    timed = [run for run in runs if run.key.budget == "time"]
    equal = {
        name: median_seconds(r for r in runs if r.variant == name and r.key.budget == "samples")
        for name in ("default", "published")
    }
    assert [run.steps for run in timed] == [round(STEPS * equal["default"] / equal["published"])] * 2


def test_table_and_plot_show_every_variant(finished: Path) -> None:
    table = (finished / "table.md").read_text()
    assert all(table.count(f"| `{name}` |") >= 1 for name in VARIANTS)
    final = [run["points"][-1]["figures"]["top1"] for run in runs_of(finished) if run["variant"] == "shared"]
    assert f"{100 * sum(final) / 2:.2f} ± " in table
    assert "At equal time" in table
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["digits", "photos"])
def test_labels_of_real_images_are_the_nearest_clusters(ablation: ModuleType, kind: str) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    import ablation_data

    data = ablation_data.make_data(kind, 50, seed=3)
    assert data.train.labels.shape[1] == 10 and int(data.train.labels.max()) < 50
    # Images with the same nearest cluster lie closer together than images at large.
    inputs, first = data.held_out.inputs, data.held_out.labels[:, 0]
    distance = torch.cdist(inputs, inputs)
    same = (first[:, None] == first).fill_diagonal_(False)
    assert distance[same].mean() < 0.8 * distance.mean()
    view = data.view(inputs, torch.Generator().manual_seed(0))
    assert 0.4 < float((view[inputs != 0] != 0).float().mean()) < 0.6
