"""The benchmark of heads: its yardsticks compute what they claim, and its command does what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ove.config.objectives import PartialFCConfig
from tests.support.distributed import run_distributed
from tests.support.reference_heads import dense_sample_losses
from tests.support.tool_scripts import run_script

sys.path.append(str(Path(__file__).parents[2] / "tools/benchmark"))

import head_rounds
from full_softmax_head import FullSoftmaxHead
from head_contenders import Workload
from head_report import summarize, table
from head_rounds import Measurement
from head_traffic import active_rows
from published_head import PublishedHead

NUM_CLASSES, WIDTH, SLOTS = 41, 5, 3
SCRIPT = "benchmark/heads.py"
TINY = ("--num-classes", 300, "--embedding-size", 16, "--batch-size", 4, "--labels", 9, "--warmup", 1, "--steps", 1)
CONFIG = PartialFCConfig(
    kind="partial_fc",
    source="pages",
    num_classes=NUM_CLASSES,
    labels_per_step=SLOTS,
    logit_scale=16.0,
    margin_type="cosface",
    margin=0.3,
    co_positives="negative",
    interclass_filter=0.4,
    interclass_filter_mode="zero",
)


def _samples(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(NUM_CLASSES, (count, SLOTS), generator=generator)
    labels[1, 2] = labels[1, 0]  # a class that is stored twice
    return torch.randn(count, WIDTH, generator=generator), labels


def _dense(
    embeddings: Tensor, weight: Tensor, labels: Tensor, classes: list[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (mean over samples and slots) and gradients in float64."""
    embeddings, weight = embeddings.double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = dense_sample_losses(embeddings, weight, labels, CONFIG, classes).mean()
    loss.backward()
    assert embeddings.grad is not None and weight.grad is not None
    return loss.detach(), embeddings.grad, weight.grad


def _assert_close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    difference = (actual.double() - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5


def _published(sample_rate: float, group: torch.distributed.ProcessGroup | None = None) -> PublishedHead:
    torch.manual_seed(3 + (group.rank() if group else 0))
    return PublishedHead(
        NUM_CLASSES,
        WIDTH,
        num_slots=SLOTS,
        sample_rate=sample_rate,
        lr=0.1,
        group=group,
        logit_scale=CONFIG.logit_scale,
        interclass_filter=CONFIG.interclass_filter,
    )


@pytest.mark.parametrize("sample_rate", [0.05, 0.3, 1.0])
def test_published_head_is_the_dense_softmax_over_the_rows_it_drew(sample_rate: float) -> None:
    head = _published(sample_rate)
    pooled, labels = _samples()
    pooled.requires_grad_()
    loss = head.loss(pooled, labels)
    loss.backward()
    for rows, slot in zip(head.drawn_rows, labels.unbind(1), strict=True):
        assert len(rows.unique()) == len(rows) == max(len(slot.unique()), int(sample_rate * NUM_CLASSES))
    expected, g_embeddings, g_weight = _dense(pooled.detach(), head.weight, labels, head.drawn_rows)
    _assert_close(loss.detach(), expected)
    # As published: the reported loss is the mean over slots, the gradient is that of their sum.
    _assert_close(pooled.grad, SLOTS * g_embeddings)
    _assert_close(head.weight.grad, SLOTS * g_weight)


def _published_on_rank(rank: int, world_size: int) -> dict[str, object]:
    assert torch.distributed.group.WORLD is not None
    head = _published(0.3, torch.distributed.group.WORLD)
    pooled, labels = _samples()
    mine = slice(rank * len(pooled) // world_size, (rank + 1) * len(pooled) // world_size)
    own = pooled[mine].clone().requires_grad_()
    loss = head.loss(own, labels[mine])
    loss.backward()
    drawn = [rows + head.first_class for rows in head.drawn_rows]
    return {
        "loss": loss.detach(),
        "pooled": own.grad,
        "drawn": drawn,
        "weight": head.weight.detach(),
        "grad": head.weight.grad,
    }


def test_published_head_on_two_ranks_is_one_softmax() -> None:
    results = run_distributed(_published_on_rank, 2)
    weight = torch.cat([result["weight"] for result in results])
    classes = [torch.cat(parts) for parts in zip(*(result["drawn"] for result in results), strict=True)]
    expected, g_embeddings, g_weight = _dense(_samples()[0], weight, _samples()[1], classes)
    for result in results:
        _assert_close(result["loss"], expected)
    _assert_close(torch.cat([result["pooled"] for result in results]), SLOTS * g_embeddings)
    _assert_close(torch.cat([result["grad"] for result in results]), SLOTS * g_weight)


@pytest.mark.parametrize("chunk_size", [7, 100])
def test_full_softmax_head_is_the_dense_softmax(chunk_size: int) -> None:
    head = FullSoftmaxHead(
        NUM_CLASSES,
        WIDTH,
        lr=0.1,
        chunk_size=chunk_size,
        logit_scale=CONFIG.logit_scale,
        interclass_filter=CONFIG.interclass_filter,
    )
    pooled, labels = _samples()
    pooled.requires_grad_()
    loss = head.loss(pooled, labels)
    loss.backward()
    expected, g_embeddings, g_weight = _dense(pooled.detach(), head.weight, labels, None)
    _assert_close(loss.detach(), expected)
    _assert_close(pooled.grad, g_embeddings)
    _assert_close(head.weight.grad, g_weight)


def test_dense_update_moves_rows_without_gradient() -> None:
    head = _published(0.05)
    pooled, labels = _samples()
    before = head.weight.detach().clone()
    head.loss(pooled, labels).backward()
    head.update()
    idle = torch.ones(NUM_CLASSES, dtype=torch.bool)
    idle[torch.cat(head.drawn_rows)] = False
    assert idle.any()
    torch.testing.assert_close(head.weight.detach()[idle], before[idle] * (1 - 0.1 * 0.05))
    assert (head.weight.detach()[~idle] - before[~idle]).abs().min() > 0


def test_ratios_are_over_the_published_head() -> None:
    summary = summarize(
        {
            "default": Measurement([1.0, 3.0, 2.0], [2.0], peak_bytes=100, moved_bytes=5),
            "published": Measurement([40.0, 50.0, 60.0], [50.0], peak_bytes=400, moved_bytes=50),
            "full_softmax": Measurement(missing="needs more"),
        }
    )
    figures = summary["default"]
    assert figures["ratio_time_vs_published"] == 25
    assert figures["ratio_memory_vs_published"] == 0.25
    assert figures["ratio_bytes_vs_published"] == 0.1
    assert "needs more" in table(summary)


@pytest.mark.parametrize("negatives", ["per_label", "shared"])
def test_active_rows_fixes_the_union_of_the_sets(negatives: str) -> None:
    for num_classes in (20_000, 2_000_000):
        work = Workload(num_classes, batch_size=1, labels_per_step=4, active_rows=2_000)
        assert active_rows(negatives, work) == pytest.approx(2_000, rel=0.01)


def test_zipf_labels_are_class_ids_with_small_ones_in_front() -> None:
    work = Workload(1000, embedding_size=2, batch_size=500, label_distribution="zipf")
    labels = work.samples(0, 0, 1)[0].labels
    assert 0 <= labels.min() < 3 and 900 < labels.max() < 1000
    assert 0.45 < (labels < 31).double().mean() < 0.55


def test_command_writes_json(tmp_path: Path) -> None:
    report = tmp_path / "heads.json"
    assert run_script(SCRIPT, *TINY, "--contenders", "default", "--repeats", 2, "--json", report) == 0
    figures = json.loads(report.read_text())["contenders"]["default"]
    assert len(figures["all_seconds"]) == 2
    assert figures["peak_memory_bytes"] > 0 and figures["bytes_moved"] > 0


@pytest.mark.full
def test_command_compares_and_writes_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, picture = tmp_path / "heads.json", tmp_path / "heads.png"
    options = ("--contenders", "default", "published", "--repeats", 2, "--sweep", "classes", "--sweep-values", 200)
    assert run_script(SCRIPT, *TINY, *options, "--json", report, "--plot", picture) == 0
    assert "times faster" in capsys.readouterr().out
    result = json.loads(report.read_text())
    assert result["ratio_time_vs_published"] > 0 and result["ratio_memory_vs_published"] is not None
    for name in ("default", "published"):
        figures = result["contenders"][name]
        assert len(figures["all_seconds"]) == 2
        assert figures["steps_per_second"] == pytest.approx(1 / figures["seconds"])
        assert figures["peak_memory_bytes"] > 0 and figures["bytes_moved"] > 0
    assert result["contenders"]["published"]["ratio_time_vs_published"] == 1
    assert [point["value"] for point in result["sweeps"]["classes"]] == [200]
    assert result["machine"]["torch"] == torch.__version__
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_contenders_that_do_not_fit_together_run_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_rounds, "fits_together", lambda costs, *_, **__: len(costs) == 1)
    work = Workload(200, embedding_size=8, batch_size=4, stored_labels=8)
    schedule = head_rounds.Schedule(steps=2, rounds=1, warmup=0, ranks=2)
    results = head_rounds.measure(["default", "published"], work, schedule)
    assert [len(result.seconds) for result in results.values()] == [2, 2]


def test_contender_that_does_not_fit_is_left_out_with_the_reason() -> None:
    work = Workload(10**12, stored_labels=8)
    (result,) = head_rounds.measure(["published"], work, head_rounds.Schedule()).values()
    assert result.missing.startswith("needs about") and not result.seconds


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--head", "negatives=shred"), "--head: negatives = 'shred' is not one of the known values"),
        (("--head", "margn=0.2"), "--head: unknown key 'margn'; did you mean 'margin'?"),
        (("--optim", "beta1"), "--optim beta1 has no '=', so it sets nothing; write --optim KEY=VALUE"),
        (("--labels", "4"), "--labels 4 is less than --labels-per-step 8"),
        (("--ranks", "3"), "a batch of 4 samples does not divide evenly over --ranks 3"),
        (("--ranks", "2", "--contenders", "full_softmax"), "holds all classes in one process, but --ranks is 2"),
        (("--sweep-values", "3"), "--sweep-values needs exactly one --sweep"),
    ],
)
def test_wrong_option_is_one_sentence(
    options: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(SCRIPT, *TINY, *options) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
