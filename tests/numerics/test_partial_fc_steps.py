"""A step's life on one process: microbatches left out, nothing to learn from, poison, draws by step, several heads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.errors import CheckpointError, ConfigError, DataError
from megatron_ove.kinds import load_kinds
from megatron_ove.objectives.build import build_objectives
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.parallel.topology import ParallelTopology, destroy_topology
from tests.support.head_steps import (
    NAME,
    Case,
    assert_close,
    build,
    dense_step,
    make_batch,
    make_case,
    make_features,
    run_microbatches,
    start,
    table_of,
)
from tests.support.objective_steps import begin, prepare

WHOLE = [[list(range(9))]]


@pytest.fixture(scope="module")
def topology() -> Iterator[ParallelTopology]:
    yield start(1)
    destroy_topology()


def contents(objectives: ObjectiveSet) -> list[Tensor]:
    table = table_of(objectives)
    return [tensor.clone() for tensor in (table.weight, table.exp_avg, table.exp_avg_sq, table.steps)]


def assert_untouched(objectives: ObjectiveSet, before: list[Tensor]) -> None:
    assert all(torch.equal(old, new) for old, new in zip(before, contents(objectives), strict=True))


def forward(case: Case, objectives: ObjectiveSet, batch, samples) -> Tensor:
    pooled = case.embeddings[list(samples)].requires_grad_()
    return objectives.forward(make_features(pooled, batch), batch, {NAME: 1 / case.num_items}).loss


@pytest.mark.parametrize("embedding_size", [6, 12])
@pytest.mark.parametrize("left_out", ["forward", "backward"])
def test_a_microbatch_without_a_backward_pass_adds_nothing(topology, embedding_size, left_out):
    """Its cosines already lie where its coefficients would; with 12 elements that is also where gradients are kept."""
    case = make_case(sample_rate=0.5, embedding_size=embedding_size)
    layout = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    norms, gradients = [], []
    for skipped in (None, 0, 1, 2):
        objectives = build(case, topology)
        batches = [make_batch(case, samples) for samples in layout]
        begin(objectives, case.step, batches)
        # A full table of NaN in the reused memory must not shine through either.
        for index, (batch, samples) in enumerate(zip(batches, layout, strict=True)):
            if index == skipped and left_out == "forward":
                continue
            loss = forward(case, objectives, batch, samples)
            if index != skipped:
                loss.backward()
        norms.append(float(objectives.gradient_norms()[NAME]))
        gradients.append(table_of(objectives).gradient_of_rows())
    whole, parts = gradients[0], gradients[1:]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-4, atol=1e-6)
    for norm, gradient in zip(norms, gradients, strict=True):
        assert norm == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_backward_passes_may_come_in_any_order_and_after_all_forward_passes(topology):
    """As pipeline schedules do it."""
    case = make_case(sample_rate=0.5, embedding_size=12)
    layout = [[0, 1, 2], [3, 4, 5, 6], [], [7, 8]]
    gradients = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        objectives = build(case, topology)
        batches = [make_batch(case, samples) for samples in layout]
        begin(objectives, case.step, batches)
        losses = [forward(case, objectives, batch, samples) for batch, samples in zip(batches, layout, strict=True)]
        for index in order:
            losses[index].backward()
        gradients.append(table_of(objectives).gradient_of_rows())
    assert_close(gradients[0], gradients[1], 1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("embedding_size", [6, 12])
def test_a_poisoned_embedding_shows_in_the_norm_and_discard_leaves_every_bit(topology, poison, embedding_size):
    case = make_case(embedding_size=embedding_size)
    objectives = build(case, topology)
    run_microbatches(case, objectives, WHOLE, topology)
    objectives.step(0.1)
    before = contents(objectives)
    case.embeddings[3, 2] = poison
    run_microbatches(case, objectives, WHOLE, topology)
    assert not torch.isfinite(objectives.gradient_norms()[NAME])
    objectives.discard()
    assert_untouched(objectives, before)
    assert float(objectives.gradient_norms()[NAME]) == 0.0
    # The memory that held the poison is used again.
    healthy = make_case(embedding_size=embedding_size, sample_rate=0.5)
    run_microbatches(replace(case, embeddings=healthy.embeddings), objectives, WHOLE, topology)
    assert torch.isfinite(objectives.gradient_norms()[NAME])


@pytest.mark.parametrize("embedding_size", [6, 12])
def test_a_poisoned_embedding_shows_in_the_loss_of_its_microbatch_only(topology, embedding_size):
    """Also where the sample has no label: the message of the refused step takes the sample keys from there."""
    for sample in (3, 4):
        case = make_case(embedding_size=embedding_size, sample_rate=0.5)
        case.embeddings[sample, 1] = float("inf")
        objectives = build(case, topology)
        batches = [make_batch(case, samples) for samples in ([0, 1, 2], [3, 4])]
        begin(objectives, 0, batches)
        healthy, poisoned = (
            float(forward(case, objectives, batch, samples).detach())
            for batch, samples in zip(batches, ([0, 1, 2], [3, 4]), strict=True)
        )
        assert healthy > 0 and poisoned != poisoned


def test_a_step_without_labels_leaves_every_bit(topology):
    case = make_case(sample_rate=0.5)
    objectives = build(case, topology)
    run_microbatches(case, objectives, WHOLE, topology)
    objectives.step(0.1)
    before = contents(objectives)
    gradients, loss, _ = run_microbatches(case, objectives, [[[], [-1, -1], [4]]], topology)
    assert loss == 0.0 and not gradients[4].any()
    assert float(objectives.gradient_norms()[NAME]) == 0.0
    objectives.step(0.1)
    assert_untouched(objectives, before)


def test_a_frozen_encoder_still_trains_the_centers(topology):
    case = make_case()
    objectives = build(case, topology)
    run_microbatches(case, objectives, WHOLE, topology)
    expected = table_of(objectives).gradient_of_rows()
    objectives.discard()

    batch = make_batch(case, range(9))
    begin(objectives, case.step, [batch])
    features = make_features(case.embeddings, batch)
    objectives.forward(features, batch, {NAME: 1 / case.num_items}).loss.backward()
    assert torch.equal(table_of(objectives).gradient_of_rows(), expected)


def test_evaluation_without_gradients_gives_the_loss_and_leaves_no_gradient(topology):
    case = make_case(sample_rate=0.5)
    objectives = build(case, topology)
    _, expected, _ = run_microbatches(case, objectives, WHOLE, topology)
    objectives.discard()
    batch = make_batch(case, range(9))
    begin(objectives, case.step, [batch])
    with torch.no_grad():
        features = make_features(case.embeddings, batch)
        loss = objectives.forward(features, batch, {NAME: 1 / case.num_items}).loss
    assert float(loss) == pytest.approx(expected) and float(objectives.gradient_norms()[NAME]) == 0.0


def draw_of_step(objectives: ObjectiveSet, case: Case, step: int) -> Tensor:
    """[c, s], what rows count in the sets."""
    begin(objectives, step, [make_batch(case, range(9))])
    active = table_of(objectives).step_table.active
    weights = torch.zeros(case.config.num_classes, active.weights.shape[1])
    weights[active.rows] = active.weights
    return weights


def test_negatives_are_a_function_of_the_step_and_differ_between_slots(topology):
    case = make_case(num_classes=200, sample_rate=0.3)
    objectives, resumed = build(case, topology), build(case, topology)
    history = [draw_of_step(objectives, case, step) for step in range(3)]
    assert torch.equal(draw_of_step(resumed, case, 2), history[2]) and not torch.equal(history[2], history[1])
    assert len(history[2].T.unique(dim=0)) == case.config.labels_per_step
    positives = dense_step(case).drawn
    for slot, members in enumerate(history[2].T):
        assert members[positives[:, slot][positives[:, slot] >= 0]].all()
        assert 35 <= int(members.sum()) <= 95  # 60 of 200 on average, standard deviation 6, and at most 9 positives


def test_heads_of_other_names_draw_other_negatives(topology):
    case = make_case(num_classes=200, sample_rate=0.3)
    configs = {NAME: case.config, "second": case.config}
    objectives = build_objectives(
        configs, kinds=load_kinds(), topology=topology, embedding_size=6, seed=11, optim=case.optim
    )
    begin(objectives, 0, [make_batch(case, range(9), tuple(configs))])
    first, second = (objectives[name].centers.step_table.active.rows.tolist() for name in configs)
    assert first != second


def test_two_objectives_add_up_with_their_scales(topology):
    case = make_case()
    other = case.config.model_copy(update={"margin_type": "arcface", "loss_weight": 0.5})
    configs = {NAME: case.config, "second": other}
    objectives = build_objectives(
        configs, kinds=load_kinds(), topology=topology, embedding_size=6, seed=11, optim=case.optim
    )
    assert list(objectives) == [NAME, "second"] and objectives.weights == {NAME: 1.0, "second": 0.5}
    assert objectives.sources_of("second") == ("pages",)
    batch = make_batch(case, [0, -1, 1, 4], tuple(configs))
    assert objectives.num_items("second", batch) == 2
    begin(objectives, 0, [batch])
    pooled = case.embeddings[[0, 8, 1, 4]].requires_grad_()
    output = objectives.forward(make_features(pooled, batch), batch, {NAME: 3.0, "second": 0.25})
    losses = [output.metrics[f"{name}/loss"][0] for name in objectives]
    assert float(output.loss) == pytest.approx(3 * float(losses[0]) + 0.25 * float(losses[1]))
    output.loss.backward()
    assert all(float(norm) > 0 for norm in objectives.gradient_norms().values())


def test_state_that_does_not_fit_is_a_sentence(topology):
    objectives = build(make_case(), topology)
    with pytest.raises(CheckpointError, match=r"the checkpoint has nothing for weight of the class centers 'tags'"):
        objectives.load_state({})
    state = {key: {"0": torch.zeros(36, 6)} for key in ("weight", "exp_avg", "exp_avg_sq", "steps")}
    with pytest.raises(
        CheckpointError, match=r"has shape \[36, 6\] for weight .* needs \[37, 6\] of 37 classes x 6; set"
    ):
        objectives.load_state({NAME: state})


@pytest.mark.parametrize("co_positives", ["masked", "negative"])
def test_the_next_step_may_be_prepared_by_another_thread_while_one_is_under_way(topology, co_positives):
    case = make_case(num_classes=200, sample_rate=0.3, co_positives=co_positives)
    layout = [[0, 1, 2, 3], [4, 5, -1, 6, 7, 8]]
    tables = []
    for is_ahead in (False, True):
        objectives = build(case, topology)
        steps = [[make_batch(case, samples) for samples in layout] for _ in range(4)]
        with ThreadPoolExecutor(1) as thread:
            prepared = prepare(objectives, 0, steps[0])
            for number, batches in enumerate(steps):
                objectives.begin_step(prepared)
                losses = [forward(case, objectives, batches[0], layout[0])]
                if is_ahead and number < 3:
                    prepared = thread.submit(prepare, objectives, number + 1, steps[number + 1]).result()
                pooled = [index if index >= 0 else 0 for index in layout[1]]
                losses.append(forward(case, objectives, batches[1], pooled))
                sum(losses).backward()
                objectives.gradient_norms()
                objectives.step(0.1)
                if not is_ahead and number < 3:
                    prepared = prepare(objectives, number + 1, steps[number + 1])
        tables.append(table_of(objectives).weight.clone())
    assert torch.equal(*tables)


def test_keys_are_looked_up_for_a_message_only(topology):
    class Keys:
        asked: ClassVar[list[int]] = []

        def __getitem__(self, place: int) -> str:
            self.asked.append(place)
            return f"looked-up-{place}"

    def batch_of(case: Case) -> Batch:
        batch = make_batch(case, range(9))
        return replace(batch, samples=replace(batch.samples, keys=Keys()))

    case = make_case()
    objectives = build(case, topology)
    prepare(objectives, 0, [batch_of(case)])
    assert Keys.asked == []
    case.labels[7, 3] = 99
    with pytest.raises(DataError, match="sample 'looked-up-7' of source 'pages' has the label id 99, but objective"):
        prepare(objectives, 0, [batch_of(case)])
    assert Keys.asked == [7]


def test_counts_that_are_not_those_of_the_batches_are_refused(topology):
    case = make_case()
    with pytest.raises(ValueError, match="have 3 samples for objective 'tags' where sample_counts has 4 for replica 0"):
        build(case, topology).prepare_step(0, [make_batch(case, [0, -1, 1, 2])], {"pages": np.array([[4]])})


@pytest.mark.parametrize("bad", [37, -2, 2**31 - 1, -(2**31)])
def test_a_label_that_is_no_class_is_a_sentence(topology, bad):
    case = make_case()
    case.labels[7, 3] = bad
    with pytest.raises(DataError, match=f"sample 'page-7' of source 'pages' has the label id {bad}, but objective"):
        begin(build(case, topology), 0, [make_batch(case, [0]), make_batch(case, [-1, 7])])


def test_a_batch_whose_labels_do_not_fit_its_samples_is_refused(topology):
    case = make_case()
    batch = make_batch(case, [0, 1, 2])
    wrong = replace(batch, inputs={NAME: batch.inputs[NAME][:2]})
    with pytest.raises(ValueError, match="a batch has 3 items for objective 'tags' but 2 rows of labels"):
        begin(build(case, topology), 0, [wrong])
    with pytest.raises(KeyError, match=NAME):  # nothing was collated
        begin(build(case, topology), 0, [replace(batch, inputs={})])


def test_a_batch_that_was_not_announced_is_refused(topology):
    case = make_case()
    objectives = build(case, topology)
    batch = make_batch(case, range(9))
    begin(objectives, 0, [batch])
    moved = batch.to(torch.device("cpu"))
    assert moved is not batch and float(forward(case, objectives, moved, range(9)).detach()) > 0
    with pytest.raises(RuntimeError, match="objective 'tags' got a batch that was not given to prepare_step"):
        forward(case, objectives, make_batch(case, range(9)), range(9))
    objectives.step(0.1)
    with pytest.raises(RuntimeError, match="objective 'tags' got a batch that was not given to prepare_step"):
        forward(case, objectives, batch, range(9))


@pytest.mark.parametrize(
    ("options", "obstacles"),
    [
        ({}, []),
        ({"labels_per_step": 17}, ["labels_per_step = 17 is more than 16", "17 class sets are more than 16"]),
        ({"logit_scale": 73.0}, ["logit_scale = 73 needs float64 sums"]),
        ({"optim": ClassCenterOptimConfig(update="dense")}, ["optim.class_centers.update: dense has no kernel"]),
    ],
)
def test_triton_that_cannot_be_had_is_a_sentence(topology, options, obstacles):
    with pytest.raises(ConfigError) as caught:
        build(make_case(backend="triton", **options), topology)
    text = str(caught.value)
    assert text.startswith("objectives.tags.backend = triton cannot be had: ")
    assert all(obstacle in text for obstacle in obstacles)
    assert "Triton is not installed or does not run on cpu" in text
    assert text.endswith("set backend: auto, which takes Triton where it can, or change what is named")
    build(make_case(backend="auto", **options), topology)


@pytest.mark.parametrize(("sample_rate", "expected"), [(1.0, 1.0), (0.6, 1 / 0.6), (0.02, 4.0)])
def test_the_rate_grows_with_the_time_that_a_row_waits_for_its_turn(topology, sample_rate, expected):
    """By the inverse of the share of rows that a step touches, and at most four times."""
    options = {"first_moment": "none", "second_moment": "row", "weight_decay": 0.0}
    moved = []
    for lr_scaling in ("none", "active_share"):
        optim = ClassCenterOptimConfig(**options, lr_scaling=lr_scaling)
        case = make_case(num_classes=500, sample_rate=sample_rate, negatives="shared", optim=optim)
        objectives = build(case, topology)
        before = table_of(objectives).weight.clone()
        run_microbatches(case, objectives, WHOLE, topology)
        objectives.step(1e-4)
        moved.append(table_of(objectives).weight - before)
    positives = dense_step(case).drawn
    share = sample_rate + (1 - sample_rate) * len(positives[positives >= 0].unique()) / 500
    factor = min(1 / share, 4.0)
    assert factor == pytest.approx(expected, rel=0.05)
    assert_close(moved[1], moved[0] * factor, 1e-3)


def test_a_dense_update_moves_every_row_in_every_step_so_its_rate_stays(topology):
    moved = []
    for lr_scaling in ("none", "active_share"):
        optim = ClassCenterOptimConfig(update="dense", lr_scaling=lr_scaling)
        case = make_case(sample_rate=0.1, optim=optim)
        objectives = build(case, topology)
        before = table_of(objectives).weight.clone()
        run_microbatches(case, objectives, WHOLE, topology)
        objectives.step(1e-4)
        moved.append(table_of(objectives).weight - before)
    assert torch.equal(*moved)


def test_odd_steps_and_labels_are_no_trouble(topology):
    case = make_case(sample_rate=0.3, labels_per_step=300)
    batch = make_batch(case, [0, 1, 2])
    for step in (-1, 2**63):
        objectives = build(case, topology)
        begin(objectives, step, [batch])
        forward(case, objectives, batch, [0, 1, 2]).backward()
        assert 0 < float(objectives.gradient_norms()[NAME]) < 1e6
    no_columns = replace(batch, inputs={NAME: batch.inputs[NAME][:, :0]})
    begin(objectives, 0, [no_columns])
    assert float(forward(case, objectives, no_columns, [0, 1, 2]).detach()) == 0.0


def test_an_embedding_of_zeros_gets_a_finite_gradient(topology):
    case = make_case(sample_rate=0.3)
    case.embeddings[0] = 0
    gradients, loss, _ = run_microbatches(case, build(case, topology), WHOLE, topology)
    assert loss == loss and all(torch.isfinite(gradient).all() for gradient in gradients.values())
