"""Every option of Partial FC on one process, against the dense float64 definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_ove.parallel.topology import ParallelTopology, destroy_topology
from tests.support.head_steps import (
    NAME,
    Gathered,
    Layout,
    assert_close,
    build,
    check_against_dense,
    dense_step,
    gather_results,
    make_batch,
    make_case,
    one_step,
    run_microbatches,
    start,
    table_of,
)
from tests.support.objective_steps import begin

WHOLE: Layout = [[list(range(9))]]
COMBINED = {"margin_type": "combined", "combined_margin": (1.1, 0.2, 0.15)}
MARGINS: dict[str, dict[str, Any]] = {
    "cosface": {},
    "arcface": {"margin_type": "arcface"},
    "combined": COMBINED,
}
NEGATIVES: dict[str, dict[str, Any]] = {
    "per_label": {},
    "grouped in 2": {"negatives": "grouped", "negative_groups": 2},
    "grouped in 3": {"negatives": "grouped", "negative_groups": 3},
    "shared": {"negatives": "shared"},
}


@pytest.fixture(scope="module", autouse=True)
def topology() -> Iterator[ParallelTopology]:
    yield start(1)
    destroy_topology()


@pytest.fixture
def run_case(topology: ParallelTopology) -> Callable[..., Gathered]:
    """Returns a function that does one step of a case."""
    return lambda case, layout=WHOLE: gather_results(case, [one_step(case, layout, topology, 0.1)])


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("filter_mode", ["zero", "mask"])
@pytest.mark.parametrize("co_positives", ["negative", "masked"])
@pytest.mark.parametrize("embedding_size", [6, 12])
def test_the_full_softmax_equals_the_dense_one(run_case, margin, filter_mode, co_positives, embedding_size):
    """9 samples: with 6 elements to an embedding gradients are kept densely, with 12 as factors."""
    case = make_case(
        interclass_filter_mode=filter_mode,
        co_positives=co_positives,
        embedding_size=embedding_size,
        interclass_filter=0.4 if embedding_size == 6 else 0.2,
        **MARGINS[margin],
    )
    joined = run_case(case)
    assert joined.is_active.all() and (joined.set_weights == 1).all()
    check_against_dense(case, joined)


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("co_positives", ["negative", "masked"])
@pytest.mark.parametrize("correction", ["none", "logq"])
@pytest.mark.parametrize(
    ("margin", "filter_mode", "amount"),
    [
        ("cosface", "zero", {"sample_rate": 0.4}),
        ("arcface", "mask", {"num_sampled": 9}),
    ],
)
def test_a_sampled_softmax_equals_the_dense_one_over_its_classes(
    run_case, negatives, co_positives, correction, margin, filter_mode, amount
):
    case = make_case(
        interclass_filter_mode=filter_mode,
        co_positives=co_positives,
        sampling_correction=correction,
        embedding_size=12,
        **MARGINS[margin],
        **NEGATIVES[negatives],
        **amount,
    )
    joined = run_case(case)
    probability = amount.get("sample_rate", 9 / 37)
    sampled = torch.tensor(1 / probability if correction == "logq" else 1.0)
    assert set(joined.set_weights.flatten().tolist()) == {0.0, 1.0, sampled.item()}
    num_sets = {"per_label": 4, "grouped in 2": 2, "grouped in 3": 3, "shared": 1}
    assert joined.set_weights.shape[1] == num_sets[negatives]
    check_against_dense(case, joined)
    assert not joined.row_gradient[~joined.is_active].any()


def test_a_correction_by_probability_estimates_the_full_softmax(topology):
    """The mean over many draws of a slot's sum of exponentials is the sum over all classes."""
    case = make_case(sample_rate=0.3, sampling_correction="logq", num_classes=60)
    objectives = build(case, topology)
    total = torch.zeros(60, case.config.labels_per_step)
    num_steps = 400
    for step in range(num_steps):
        begin(objectives, step, [make_batch(case, [6, 7])])
        active = table_of(objectives).step_table.active
        total[active.rows] += active.weights
    positives = dense_step(case).drawn[6:8]
    for slot in range(total.shape[1]):
        assert (total[positives[:, slot], slot] == num_steps).all()
    mean = total / num_steps
    assert abs(float(mean.mean()) - 1) < 0.03
    assert (mean - 1).abs().max() < 5 * ((1 / 0.3 - 1) / num_steps) ** 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"interclass_filter": 1.0},
        {"co_positives": "masked"},
        {"interclass_filter_mode": "mask"},
        {"margin_type": "arcface"},
        COMBINED,
        {"margin": 0.1},
        {"logit_scale": 15.0},
        {"labels_per_step": 3},
        {"sample_rate": 0.5},
        {"num_sampled": 20},
        {"sampling_correction": "logq"},
        *(options for options in NEGATIVES.values() if options),
    ],
)
def test_every_option_changes_the_loss(run_case, change):
    """So that no comparison holds because an option has no effect on this step."""
    base = {"sample_rate": 0.4, "num_classes": 37}
    losses = [run_case(make_case(**(base | extra))).loss for extra in ({}, change)]
    assert abs(losses[0] - losses[1]) > 1e-3


LAYOUTS: list[Layout] = [
    [[[0, 1, 2, 3, 4, 5, 6, 7, 8]]],
    [[[0], [], [1, 2, -1, 3, 4], [5, 6, 7, 8]]],
    [[[i] for i in range(9)]],
]


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("embedding_size", "logit_scale"), [(6, 64.0), (9, 16.0), (12, 64.0)])
def test_neither_chunks_nor_microbatches_nor_the_form_of_the_gradient_matter(
    run_case, chunk_size, layout, embedding_size, logit_scale
):
    case = make_case(chunk_size=chunk_size, sample_rate=0.6, logit_scale=logit_scale, embedding_size=embedding_size)
    check_against_dense(case, run_case(case, layout))


def test_more_positives_than_the_budget_are_all_kept(run_case):
    case = make_case(num_sampled=1, negatives="shared")
    joined = run_case(case)
    drawn = check_against_dense(case, joined).drawn
    positives = set(drawn[drawn >= 0].tolist())
    active = set(joined.is_active.nonzero().flatten().tolist())
    assert positives <= active and len(active - positives) <= 1


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_slots_beyond_the_stored_labels_are_ignored(run_case, negatives):
    """Nor are classes drawn for them."""
    case = make_case(width=3, labels_per_step=8, sample_rate=0.5, **NEGATIVES[negatives])
    joined = run_case(case)
    check_against_dense(case, joined)
    num_sets = {"per_label": 3, "grouped in 2": 1, "grouped in 3": 2, "shared": 1}
    assert joined.set_weights.shape[1] == num_sets[negatives]


def test_a_label_that_all_samples_share_in_every_slot(run_case):
    case = make_case(sample_rate=0.3)
    case.labels[:] = 5
    check_against_dense(case, run_case(case))


def test_two_classes_and_one_label(run_case):
    for options in NEGATIVES.values():
        case = make_case(num_classes=2, sample_rate=0.5, labels_per_step=4, **options)
        check_against_dense(case, run_case(case))


def test_metrics_are_sums_over_labelled_samples(topology):
    case = make_case()
    _, loss, metrics = run_microbatches(case, build(case, topology), [[[0, 1, 2, 3], [4, 5, 6, 7, 8]]], topology)
    assert metrics[f"{NAME}/loss.count"] == case.num_items == 8
    assert metrics[f"{NAME}/loss.sum"] / case.num_items == pytest.approx(loss, rel=1e-6)
    drawn = dense_step(case).drawn
    assert metrics[f"{NAME}/positive_cosine.count"] == int((drawn >= 0).sum())
    centers = torch.nn.functional.normalize(dense_step(case).centers, dim=1)
    cosines = torch.nn.functional.normalize(case.embeddings.double(), dim=1) @ centers.T
    expected = cosines.gather(1, drawn.clamp(min=0))[drawn >= 0].sum()
    assert metrics[f"{NAME}/positive_cosine.sum"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("logit_scale", [72.0, 72.1, 200.0, 500.0])
@pytest.mark.parametrize("margin_type", ["cosface", "arcface"])
def test_extreme_logits_stay_finite_and_right(run_case, logit_scale, margin_type):
    """Embeddings on their center or opposite to it, where e^logit spans up to 400 orders of magnitude."""
    case = make_case(
        num_classes=5, logit_scale=logit_scale, interclass_filter=1.0, margin_type=margin_type, sample_rate=0.6
    )
    reference = dense_step(case)
    for index, sign in enumerate((1, -1, 1, -1)):
        case.embeddings[index] = sign * reference.centers[reference.drawn[index, 0]].float() + 1e-3
    joined = run_case(case)
    check_against_dense(case, joined, loss=1e-5, gradient=1e-3)


def test_bf16_products_stay_close_to_the_dense_softmax(run_case):
    case = make_case(num_classes=200, sample_rate=0.5, compute_dtype="bfloat16", embedding_size=32)
    joined = run_case(case)
    exact = run_case(make_case(num_classes=200, sample_rate=0.5, embedding_size=32))
    assert joined.loss != exact.loss and joined.loss == pytest.approx(exact.loss, rel=5e-3)
    assert_close(joined.row_gradient, exact.row_gradient, 0.05)
    assert_close(joined.embedding_gradient, exact.embedding_gradient, 0.05)
