"""Centering on grids of gloo ranks equals the dense float64 step in which the same samples share a microbatch."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ove.checkpoint.manager import CheckpointManager
from megatron_ove.convert.class_centers import ClassHead, load_class_head
from megatron_ove.evaluation.retrieval import label_retrieval
from megatron_ove.heads.centering import EmbeddingMean, centered_directions
from megatron_ove.parallel.class_order import rows_of_classes
from tests.distributed.test_partial_fc_grid import COMBINED, GRIDS, LAYOUTS
from tests.support.distributed import run_distributed
from tests.support.head_steps import (
    NAME,
    Case,
    build,
    check_against_dense,
    dense_step,
    gather_results,
    make_case,
    run_microbatches,
    start,
    step_on_rank,
    steps_on_rank,
)
from tests.support.reference_heads import center_dense

SAMPLED = {"sample_rate": 0.4, "embedding_size": 12, "co_positives": "masked"}
OPTIONS: dict[str, dict[str, Any]] = {
    f"{centering}, {name}": {"centering": centering, **options}
    for centering in ("gradient", "embeddings")
    for name, options in {
        "full softmax": {},
        "combined margin": COMBINED,
        "sampled": SAMPLED,
        "a table per replica": SAMPLED | {"class_group": "tensor"},
    }.items()
}


def groups_of(case: Case, replicas: int) -> list[list[int]]:
    """Samples that meet the table together: a microbatch of all replicas, or of one where each has its own table."""
    layout = LAYOUTS[replicas]
    if case.config.class_group == "tensor":
        return [[i for i in samples if i >= 0] for replica in layout for samples in replica]
    return [[i for replica in layout for i in replica[index] if i >= 0] for index in range(len(layout[0]))]


@functools.cache
def results_of(grid: str) -> dict[str, Any]:
    world_size, tensor_size = GRIDS[grid]
    cases = [make_case(**options) for options in OPTIONS.values()]
    layout = LAYOUTS[world_size // tensor_size]
    ranks = run_distributed(steps_on_rank, world_size, cases, layout, tensor_size, 0.003)
    return {
        name: gather_results(case, results)
        for name, case, results in zip(OPTIONS, cases, zip(*ranks, strict=True), strict=True)
    }


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_centered_step_equals_the_dense_one_with_the_same_microbatches(grid, name):
    case, joined = make_case(**OPTIONS[name]), results_of(grid)[name]
    world_size, tensor_size = GRIDS[grid]
    groups = groups_of(case, world_size // tensor_size)
    reference = dense_step(case, joined.slot_weights, groups=groups)
    check_against_dense(case, joined, reference=reference)
    plain = dense_step(replace(case, config=case.config.model_copy(update={"centering": "none"})), joined.slot_weights)
    assert not torch.allclose(reference.embedding_gradient, plain.embedding_gradient, rtol=0.1)


def test_the_gradient_that_goes_back_has_no_common_part():
    case, joined = make_case(centering="gradient"), results_of("2")["gradient, full softmax"]
    for group in groups_of(case, 2):
        labelled = [index for index in group if (case.labels[index] >= 0).any()]
        assert joined.embedding_gradient[labelled].sum(0).abs().max() < 1e-6


def test_a_microbatch_of_equal_samples_sends_back_a_finite_gradient():
    x = torch.randn(1, 8).expand(4, 8).clone().requires_grad_()
    centered_directions(x, torch.ones(4, dtype=torch.bool)).square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() < 1e4
    alone = torch.randn(1, 8, requires_grad=True)
    (centered_directions(alone, torch.ones(1, dtype=torch.bool)) @ torch.ones(8)).sum().backward()
    assert alone.grad is not None and not alone.grad.any()


def mean_after_steps(rank: int, world_size: int, case: Case, tensor_size: int, folder: str) -> dict[str, Any]:
    """Two steps with other embeddings, a refused one, a checkpoint, a third step; then the third again, resumed."""
    topology = start(tensor_size)
    layout = LAYOUTS[topology.data_size]
    objectives = build(case, topology)
    embeddings = [case.embeddings * factor + factor for factor in (1, 2, 3)]

    def step(objectives: Any, number: int, *, accepted: bool = True) -> torch.Tensor:
        run_microbatches(replace(case, step=number, embeddings=embeddings[number]), objectives, layout, topology)
        objectives.step(0.01) if accepted else objectives.discard()
        return objectives[NAME]._mean.value.clone()

    means = [step(objectives, 0), step(objectives, 1), step(objectives, 2, accepted=False)]
    manager = CheckpointManager(folder, keep=1, verify="full", data_group=topology.data_group)
    config = {"config": {"objectives": {NAME: {"centering": "embeddings"}}}}
    state = objectives.sharded_state_dict("objectives.")
    manager.save(2, {"objectives": state, "step": 2, **config})
    means.append(step(objectives, 2))
    resumed = build(case, topology)
    newest = manager.latest()
    assert newest is not None
    resumed.load_state(manager.load(newest, {"objectives": resumed.sharded_state_dict("objectives.")})["objectives"])
    again = step(resumed, 2)
    assert torch.equal(again, means[-1]) and torch.equal(resumed[NAME].centers.weight, objectives[NAME].centers.weight)
    counts = np.array([9 if replica == 0 else 0 for replica in range(topology.data_size)])  # one replica has them all
    own = slice(0, counts[topology.data_rank])
    held_out = objectives[NAME].measure_held_out([embeddings[0][own]], [case.labels[own]], counts)
    centers = objectives[NAME].centers
    return {
        "means": means,
        "held_out": {name: float(total) for name, (total, _) in held_out.items()},
        "weight": (centers.first_row, centers.weight.clone()),
        "replica": topology.data_rank,
    }


def loaded_mean(rank: int, world_size: int, case: Case, tensor_size: int, folder: str) -> tuple[torch.Tensor, int]:
    topology = start(tensor_size)
    objectives = build(case, topology)
    manager = CheckpointManager(folder, keep=1, verify="full", data_group=topology.data_group)
    newest = manager.latest()
    assert newest is not None
    loaded = manager.load(newest, {"objectives": objectives.sharded_state_dict("objectives.")})
    objectives.load_state(loaded["objectives"])
    mean = objectives[NAME]._mean  # type: ignore[attr-defined]
    return mean.value, int(mean.steps)


def test_the_running_mean_is_read_by_any_number_of_ranks(tmp_path: Path) -> None:
    case = make_case(centering="embeddings")
    saved = run_distributed(mean_after_steps, 3, case, 1, str(tmp_path))[0]["means"][1]
    for world_size, tensor_size in ((1, 1), (2, 1), (4, 2)):
        for mean, steps in run_distributed(loaded_mean, world_size, case, tensor_size, str(tmp_path)):
            assert torch.equal(mean, saved) and steps == 2


@pytest.mark.parametrize("grid", ["1", "3", "tp2 x dp2"])
@pytest.mark.parametrize("class_group", ["stage", "tensor"])
def test_the_running_mean_is_that_of_the_labelled_samples_and_resumes_bit_for_bit(tmp_path: Path, grid, class_group):
    case = make_case(centering="embeddings", class_group=class_group)
    world_size, tensor_size = GRIDS[grid]
    labelled = (case.labels >= 0).any(1)
    step_means = [(case.embeddings * factor + factor)[labelled].mean(0) for factor in (1, 2, 3)]
    results = run_distributed(mean_after_steps, world_size, case, tensor_size, str(tmp_path))
    for result in results:
        first, second, refused, third = result["means"]
        torch.testing.assert_close(first, step_means[0])
        torch.testing.assert_close(second, (step_means[0] + step_means[1]) / 2)  # the first steps count equally
        assert torch.equal(refused, second)
        torch.testing.assert_close(third, sum(step_means) / 3)
    owners = {result["weight"][0]: result["weight"][1] for result in results}
    centers = torch.cat([owners[first] for first in sorted(owners)])
    centers = centers[rows_of_classes(torch.arange(37), 37)]
    figures = label_retrieval(case.embeddings + 1, ClassHead(centers, results[0]["means"][3]), case.labels, k=10)
    measured = next(result["held_out"] for result in results if result["replica"] == 0)
    for name in ("mean_average_precision", "recall_at_10", "first_right"):
        assert measured[name] / 8 == pytest.approx(figures[name], abs=1e-5)
    read = load_class_head(tmp_path / "step_00000002", NAME).mean
    assert read is not None and torch.equal(read, results[0]["means"][1])


def test_late_steps_move_the_mean_by_a_tenth():
    mean = EmbeddingMean(2, torch.device("cpu"), None)
    mean.steps.fill_(1000)
    mean.observe(torch.tensor([[10.0, 0.0], [7.0, 7.0]]), torch.tensor([True, False]))
    mean.apply_update()
    torch.testing.assert_close(mean.value, torch.tensor([1.0, 0.0]))
    mean.apply_update()  # a step without a labelled sample
    torch.testing.assert_close(mean.value, torch.tensor([1.0, 0.0]))
    assert int(mean.steps) == 1001


def test_samples_without_a_label_have_no_part():
    case, joined = make_case(centering="embeddings"), results_of("1")["embeddings, full softmax"]
    assert not joined.embedding_gradient[4].any()  # sample 4 has no label
    centered = center_dense(case.embeddings, [[3, 4, 5]], (case.labels >= 0).any(1))
    assert torch.equal(centered[4], case.embeddings[4])
    torch.testing.assert_close(centered[3], (case.embeddings[3] - case.embeddings[5]) / 2)


def test_without_the_option_nothing_changes():
    """The same bits as a head that normalizes before it gathers, which it did before there was an option."""
    case = make_case(sample_rate=0.4)
    results = run_distributed(step_on_rank, 2, case, LAYOUTS[2], 1, 0.003)
    assert all("embedding_mean" not in result for result in results)
    torch.manual_seed(0)
    x = torch.randn(13, 24)
    whole = torch.nn.functional.normalize(x, dim=1)
    parts = torch.cat([torch.nn.functional.normalize(part, dim=1) for part in x.split([5, 0, 8])])
    assert torch.equal(whole, parts)
