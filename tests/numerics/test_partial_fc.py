"""Every option of Partial FC on one process, against the dense float64 definition."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from megatron_ove.errors import CheckpointError
from megatron_ove.objectives.build import build_objectives
from megatron_ove.outputs import VisionFeatures
from megatron_ove.parallel.topology import destroy_topology
from tests.support.head_steps import (
    NAME,
    assert_close,
    build,
    dense_step,
    gather_results,
    make_batch,
    make_case,
    run_microbatches,
    start,
    step_on_rank,
    table_of,
)

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
OPTIONS = list(
    itertools.product(["cosface", "arcface"], ["zero", "mask"], ["per_label", "shared"], ["negative", "masked"])
)


@pytest.fixture(autouse=True)
def single_process():
    yield
    if dist.is_initialized():
        destroy_topology()


def run_case(case, layout):
    joined = gather_results(case, [step_on_rank(0, 1, case, layout, 1, 0.1)])
    destroy_topology()
    sets = joined.sets if len(joined.sets) > 1 else joined.sets * case.config.labels_per_step
    return joined, sets


@pytest.mark.parametrize(("margin_type", "filter_mode", "negatives", "co_positives"), OPTIONS)
@pytest.mark.parametrize("sample_rate", [1.0, 0.4])
def test_every_option_equals_the_dense_softmax(margin_type, filter_mode, negatives, co_positives, sample_rate):
    case = make_case(
        margin_type=margin_type,
        interclass_filter_mode=filter_mode,
        negatives=negatives,
        co_positives=co_positives,
        sample_rate=sample_rate,
    )
    joined, sets = run_case(case, [[list(range(9))]])
    reference = dense_step(case, sets)
    assert joined.loss == pytest.approx(reference.loss, rel=LOSS_TOLERANCE)
    assert_close(joined.embedding_gradient, reference.embedding_gradient, GRADIENT_TOLERANCE)
    assert_close(joined.row_gradient, reference.center_gradient, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("change", ["interclass_filter", "co_positives", "filter_mode", "margin_type", "negatives"])
def test_every_option_changes_the_loss(change):
    """So that none of the comparisons above holds because an option has no effect on this step."""
    base = {"sample_rate": 0.4, "num_classes": 37}
    changed = {
        "interclass_filter": {"interclass_filter": 1.0},
        "co_positives": {"co_positives": "masked"},
        "filter_mode": {"interclass_filter_mode": "mask"},
        "margin_type": {"margin_type": "arcface"},
        "negatives": {"negatives": "shared"},
    }[change]
    losses = [run_case(make_case(**base, **extra), [[list(range(9))]])[0].loss for extra in ({}, changed)]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("layout", [[[0, 1, 2, 3, 4, 5, 6, 7, 8]], [[0], [], [1, 2, 3, 4], [5, 6, 7, 8]]])
def test_neither_chunks_nor_microbatches_matter(chunk_size, layout):
    case = make_case(chunk_size=chunk_size, sample_rate=0.6, logit_scale=64.0)
    joined, sets = run_case(case, [layout])
    reference = dense_step(case, sets)
    assert joined.loss == pytest.approx(reference.loss, rel=LOSS_TOLERANCE)
    assert_close(joined.embedding_gradient, reference.embedding_gradient, GRADIENT_TOLERANCE)
    assert_close(joined.row_gradient, reference.center_gradient, GRADIENT_TOLERANCE)


def test_more_positives_than_the_budget_are_all_kept():
    case = make_case(sample_rate=0.05, negatives="shared")
    joined, sets = run_case(case, [[list(range(9))]])
    drawn = dense_step(case, sets).drawn
    assert joined.sets[0].tolist() == drawn[drawn >= 0].unique().tolist()
    assert joined.loss == pytest.approx(dense_step(case, sets).loss, rel=LOSS_TOLERANCE)


def test_slots_beyond_the_stored_labels_are_ignored():
    case = make_case(width=3, labels_per_step=8, sample_rate=0.5)
    joined, sets = run_case(case, [[list(range(9))]])
    assert joined.loss == pytest.approx(dense_step(case, sets).loss, rel=LOSS_TOLERANCE)


def test_metrics_are_sums_over_labelled_samples():
    case = make_case()
    topology = start(1)
    _, loss, metrics = run_microbatches(case, build(case, topology), [[[0, 1, 2, 3], [4, 5, 6, 7, 8]]], topology)
    assert metrics[f"{NAME}/loss.count"] == case.num_items == 8
    assert metrics[f"{NAME}/loss.sum"] / case.num_items == pytest.approx(loss, rel=1e-6)
    drawn = dense_step(case).drawn
    assert metrics[f"{NAME}/positive_cosine.count"] == int((drawn >= 0).sum())
    centers = torch.nn.functional.normalize(dense_step(case).centers, dim=1)
    cosines = torch.nn.functional.normalize(case.embeddings.double(), dim=1) @ centers.T
    expected = cosines.gather(1, drawn.clamp(min=0))[drawn >= 0].sum()
    assert metrics[f"{NAME}/positive_cosine.sum"] == pytest.approx(float(expected), rel=1e-5)


def test_extreme_logits_stay_finite_and_right():
    """Embeddings that lie on their center or opposite to it, at a scale where a shared shift would underflow."""
    case = make_case(num_classes=5, logit_scale=200.0, interclass_filter=1.0, margin_type="arcface", sample_rate=0.6)
    centers = dense_step(case).centers.float()
    for index, sign in enumerate((1, -1, 1, -1)):
        case.embeddings[index] = sign * centers[int(case.labels[index, 0])] + 1e-3
    joined, sets = run_case(case, [[list(range(9))]])
    reference = dense_step(case, sets)
    assert joined.loss == pytest.approx(reference.loss, rel=1e-5)
    assert_close(joined.embedding_gradient, reference.embedding_gradient, 1e-3)
    assert_close(joined.row_gradient, reference.center_gradient, 1e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_embedding_shows_in_the_norm_and_discard_leaves_every_bit(poison):
    case = make_case()
    topology = start(1)
    objectives = build(case, topology)
    run_microbatches(case, objectives, [[list(range(9))]], topology)
    objectives.apply_update(0.1)
    table = table_of(objectives)
    before = [tensor.clone() for tensor in (table.weight, table.exp_avg, table.exp_avg_sq, table.steps)]
    case.embeddings[3, 2] = poison
    run_microbatches(case, objectives, [[list(range(9))]], topology)
    assert not torch.isfinite(objectives.row_gradient_norms()[NAME])
    objectives.discard_update()
    after = (table.weight, table.exp_avg, table.exp_avg_sq, table.steps)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert float(objectives.row_gradient_norms()[NAME]) == 0.0


def test_a_step_without_samples_leaves_every_bit():
    case = make_case(sample_rate=0.5)
    topology = start(1)
    objectives = build(case, topology)
    run_microbatches(case, objectives, [[list(range(9))]], topology)
    objectives.apply_update(0.1)
    table = table_of(objectives)
    before = [tensor.clone() for tensor in (table.weight, table.exp_avg, table.steps)]
    gradients, loss, _ = run_microbatches(case, objectives, [[[], [-1, -1], [4]]], topology)
    assert loss == 0.0 and not gradients[4].any()
    objectives.apply_update(0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, (table.weight, table.exp_avg, table.steps), strict=True))


def test_a_frozen_encoder_still_trains_the_centers():
    case = make_case()
    topology = start(1)
    objectives = build(case, topology)
    run_microbatches(case, objectives, [[list(range(9))]], topology)
    expected = table_of(objectives).row_gradient.clone()
    objectives.discard_update()

    batch = make_batch(case, range(9))
    objectives.begin_step(case.step, [batch])
    features = VisionFeatures(torch.empty(0), case.embeddings, batch.cu_seqlens)
    objectives.forward(features, batch, {NAME: 1 / case.num_items}).loss.backward()
    assert torch.equal(table_of(objectives).row_gradient, expected)


def drawn_sets(objectives, case, step):
    objectives.begin_step(step, [make_batch(case, range(9))])
    return [part.tolist() for part in (objectives[NAME]._active.rows[m] for m in objectives[NAME]._active.members)]


def test_negatives_are_a_function_of_the_step_and_differ_between_slots():
    case = make_case(num_classes=200, sample_rate=0.3)
    topology = start(1)
    objectives, resumed = build(case, topology), build(case, topology)
    history = [drawn_sets(objectives, case, step) for step in range(3)]
    assert drawn_sets(resumed, case, 2) == history[2] != history[1]
    assert len({tuple(classes) for classes in history[2]}) == case.config.labels_per_step
    assert [len(classes) for classes in history[2]] == [60] * case.config.labels_per_step


def test_two_objectives_add_up_with_their_scales():
    case = make_case()
    topology = start(1)
    other = case.config.model_copy(update={"margin_type": "arcface", "loss_weight": 0.5})
    configs = {NAME: case.config, "second": other}
    objectives = build_objectives(configs, topology=topology, embedding_size=6, seed=11, optim=case.optim)
    assert list(objectives) == [NAME, "second"] and objectives.weights == {NAME: 1.0, "second": 0.5}
    assert objectives.source_of("second") == "pages"
    batch = make_batch(case, [0, -1, 1, 4])
    assert objectives.num_items("second", batch) == 2
    objectives.begin_step(0, [batch])
    pooled = case.embeddings[[0, 8, 1, 4]].requires_grad_()
    features = VisionFeatures(torch.empty(0), pooled, batch.cu_seqlens)
    output = objectives.forward(features, batch, {NAME: 3.0, "second": 0.25})
    losses = [output.metrics[f"{name}/loss"][0] for name in objectives]
    assert float(output.loss) == pytest.approx(3 * float(losses[0]) + 0.25 * float(losses[1]))
    output.loss.backward()
    assert all(float(norm) > 0 for norm in objectives.row_gradient_norms().values())


def test_state_that_does_not_fit_is_a_sentence():
    case = make_case()
    objectives = build(case, start(1))
    with pytest.raises(CheckpointError, match=r"the checkpoint has nothing for weight of the class centers 'tags'"):
        objectives.load_state({})
    state = {key: torch.zeros(36, 6) for key in ("weight", "exp_avg", "exp_avg_sq", "steps")}
    with pytest.raises(
        CheckpointError, match=r"has shape \[36, 6\] for weight .* needs \[37, 6\] of 37 classes x 6; set"
    ):
        objectives.load_state({NAME: state})
