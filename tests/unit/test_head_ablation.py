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


def test_stored_runs_are_read_as_they_were_made_and_kept_to_the_letter(ablation: ModuleType, tmp_path: Path) -> None:
    from ablation_heads import settings_of
    from ablation_report import write_markdown
    from ablation_runs import Run, RunFile, RunKey

    stored = Path(__file__).parents[2] / "docs/ablation/head_ablation.json"
    copy = tmp_path / "runs.json"
    copy.write_bytes(stored.read_bytes())
    file = RunFile(copy)
    old = next(run for run in file.runs if run.key.classes == 400 and run.variant == "rate_10")
    assert "centering" not in old.settings["head"]
    assert file.find(old.key, settings_of("rate_10", 400)) == old
    # What an option of today does that the old run did not have is another run.
    assert file.find(old.key, settings_of("centered_gradient", 400)) is None
    lines = copy.read_text().splitlines()
    file.add(Run(RunKey("words", 20, 0, 32, 8, initializer_range=0.05), "small", 8, {}, old.points, {}, 0.5))
    kept, added = copy.read_text().splitlines()[: len(lines) - 1], copy.read_text().splitlines()[len(lines) - 1]
    assert [line.rstrip(",") for line in kept] == [line.rstrip(",") for line in lines[:-1]]
    assert json.loads(added)["mean_cosine"] == 0.5

    write_markdown(tmp_path / "table.md", RunFile(stored).runs, None)
    now, published = ((tmp_path / "table.md").read_text(), stored.with_suffix(".md").read_text())
    for table in published.split("\n## ")[1:]:
        assert table.split("\n#")[0].strip() in now


WORD_VARIANTS = ("published", "default", "small_embeddings")


@pytest.fixture(scope="module")
def words(ablation: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on pictures of words: two batch sizes and two initial ranges, and a pretrained encoder."""
    import ablation_data
    import ablation_training

    folder = tmp_path_factory.mktemp("words")
    tiny = f"--data words --classes 20 --seeds 1 --samples 64 --json {folder / 'runs.json'} --variants".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation_data, "WORDS_TRAIN", 60)
        patch.setattr(ablation_data, "WORDS_HELD_OUT", 20)
        patch.setattr(ablation, "PRETRAINING_SAMPLES", 64)
        patch.setattr(ablation_training, "PRETRAINING_BATCH_SIZE", 16)
        sizes = ["--batch-size", "16", "32"]
        assert ablation.main([*tiny, *WORD_VARIANTS, *sizes, "--initializer-range", "0.05", "0.02"]) == 0
        files = ["--markdown", str(folder / "table.md"), "--plot", str(folder / "plot.png")]
        assert ablation.main([*tiny, "default", *sizes, "--pretrained", *files]) == 0
    return folder


def test_batch_sizes_of_words_see_the_same_number_of_samples(words: Path) -> None:
    runs = runs_of(words)
    assert len(runs) == 2 * 2 * len(WORD_VARIANTS) + 2
    assert {(run["key"]["batch_size"], run["steps"]) for run in runs} == {(16, 4), (32, 2)}
    assert all(run["points"][-1]["samples"] == 64 for run in runs)
    assert all(0 < run["points"][-1]["figures"]["precision"] <= 1 for run in runs)


def test_mean_cosine_is_that_of_the_encoder_which_the_run_started_from(words: Path) -> None:
    starts = {}
    for run in runs_of(words):
        key = run["key"]
        starts.setdefault((key["initializer_range"], "pretrained_samples" in key), set()).add(run["mean_cosine"])
    assert set(starts) == {(0.05, False), (0.02, False), (0.05, True)}
    assert all(len(cosines) == 1 for cosines in starts.values())  # the same for every variant and batch size
    assert len(set.union(*starts.values())) == 3


def test_a_shift_moves_every_embedding_alike(ablation: ModuleType) -> None:
    from ablation_encoders import PictureEncoder, mean_cosine

    encoder = PictureEncoder(0.05)
    pictures = torch.randint(256, (8, 28, 112), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.no_grad():
        before = encoder(pictures)
        encoder.shift(-before.mean(0))
        torch.testing.assert_close(encoder(pictures), before - before.mean(0), rtol=1e-4, atol=1e-5)
    # Three directions in the plane, 120 degrees apart; and two that are the same.
    plane = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
    assert mean_cosine(plane) == pytest.approx(-0.5) and mean_cosine(plane[[0, 0]]) == pytest.approx(1.0)


def test_table_and_plots_of_words(words: Path) -> None:
    table = (words / "table.md").read_text()
    assert "## words, 20 classes, initial range 0.05, 4 steps of 16 samples" in table
    assert "## words, 20 classes, initial range 0.05, pretrained, 2 steps of 32 samples" in table
    assert "## words, 20 classes, initial range 0.02, 2 steps of 32 samples" in table
    assert "| mAP |" in table and "Mean cosine of two embeddings before the first step: 0." in table
    compared = table.split("# Differences to the default")[1]
    assert compared.count("| `small_embeddings` |") == 4 and "| `default` |" not in compared
    assert (words / "plot_axes.png").read_bytes().startswith(b"\x89PNG")


def test_panels_of_the_axes_hold_series_that_differ_in_nothing_else(ablation: ModuleType) -> None:
    from ablation_axes import panels_of
    from ablation_runs import Run, RunKey

    def run(classes: int, batch_size: int, steps: int, **more: object) -> Run:
        return Run(RunKey("synthetic", classes, 0, batch_size, steps, **more), "default", steps, {}, [])

    runs = [run(300, 64, 16), run(300, 16, 64), run(5000, 64, 16), run(300, 32, 16), run(300, 64, 16, budget="time")]
    ((_, by_batch), (_, by_classes)) = panels_of(runs)
    assert [(title, list(members)) for title, members in by_batch] == [
        ("synthetic, 300 classes, 1,024 samples", [16, 64])
    ]
    assert [(title, list(members)) for title, members in by_classes] == [("synthetic, batch size 64", [300, 5000])]


def test_words_and_pictures_follow_from_the_seed(ablation: ModuleType) -> None:
    from ablation_words import word_list, word_pictures

    words, others = word_list(300, 0), word_list(300, 0, others=True)
    assert words == word_list(300, 0) != word_list(300, 1)
    assert len({*words, *others}) == 600
    pictures, classes = word_pictures(words, 8, "train", seed=0)
    assert pictures.shape == (8, 28, 112) and pictures.dtype == torch.uint8 and int(classes.max()) < 300
    assert torch.equal(pictures, word_pictures(words, 8, "train", seed=0)[0])
    assert not torch.equal(pictures, word_pictures(words, 8, "siblings", seed=0)[0])
    with pytest.raises(ValueError, match="take fewer --classes"):
        word_list(2_000, 0)


def test_the_running_mean_is_taken_away_only_where_training_took_one_away(ablation: ModuleType) -> None:
    from ablation_heads import make_head

    from megatron_ove.config.parallel import ParallelConfig
    from megatron_ove.parallel.topology import destroy_topology, initialize_topology

    topology = initialize_topology(ParallelConfig(), seed=0)
    try:
        pooled = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) + 3.0
        for variant in ("published", "default", "small_gradient", "centered_embeddings"):
            head = make_head(variant, 20, 128, num_labels=1, seed=0, topology=topology)
            inputs = pooled.clone().requires_grad_()
            head.loss(0, inputs, torch.arange(32)[:, None] % 20, torch.arange(32)).backward()
            head.update(1e-3)
            mean = torch.as_tensor(head.embedding_mean()).expand(128)
            expected = pooled.mean(0) if variant == "centered_embeddings" else torch.zeros(128)
            torch.testing.assert_close(mean, expected)
            common = inputs.grad.sum(0).norm() / inputs.grad.norm(dim=1).sum()
            assert (common < 1e-5) == (variant in ("small_gradient", "centered_embeddings")), variant
    finally:
        destroy_topology()


def test_warm_up_is_counted_in_samples(ablation: ModuleType) -> None:
    from ablation_training import LEARNING_RATE, learning_rate

    # Stored runs: 50 steps of 128.
    assert learning_rate(49, 1000, 128) == LEARNING_RATE * (1 - 49 / 1000) > learning_rate(48, 1000, 128)
    assert learning_rate(199, 2000, 32) == pytest.approx(LEARNING_RATE * (1 - 199 / 2000))
    assert learning_rate(98, 2000, 32) == pytest.approx(LEARNING_RATE * 99 / 200 * (1 - 98 / 2000))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--pretrained", "are of --data words, not of synthetic"),
        ("--data digits --initializer-range 0.02", "are of --data words, not of digits"),
        ("--samples 1000 --batch-size 50 64", "--samples 1000 is no multiple of the batch size 64"),
        ("--samples 1000 --steps 10", "not allowed with argument"),
    ],
)
def test_options_that_do_not_fit(
    ablation: ModuleType, options: str, sentence: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        ablation.parse(options.split())
    assert sentence in capsys.readouterr().err
