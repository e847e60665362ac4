"""Several steps of a head, update included, against float64: dense softmax, dense gradient, AdamW by its definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.parallel.topology import ParallelTopology, destroy_topology
from tests.support.head_steps import (
    EXACT_OPTIM,
    NAME,
    Case,
    build,
    dense_step,
    make_case,
    run_microbatches,
    start,
    table_of,
)

LAYOUT = [[[0, 1, 2, 3, 4], [5, 6, 7, 8]]]
LR, STEPS = 0.003, 6


@pytest.fixture(scope="module")
def topology() -> Iterator[ParallelTopology]:
    yield start(1)
    destroy_topology()


def steps_of(case: Case) -> list[Case]:
    """The same samples with other embeddings and other draws in every step."""
    generator = torch.Generator().manual_seed(8)
    return [
        replace(
            case,
            embeddings=torch.randn(case.embeddings.shape, generator=generator),
            seeds=torch.randint(0, 2**62, case.seeds.shape, generator=generator),
            step=step,
        )
        for step in range(STEPS)
    ]


def set_weights_of(table: Any, config: Any) -> tuple[Tensor, Tensor]:
    """Returns (per_label sets as slot weights [k, c], active rows [c] bool)."""
    active = table.step_table.active
    weights = torch.zeros(config.num_classes, config.labels_per_step)
    weights[active.rows] = active.weights.expand(-1, config.labels_per_step)
    is_active = torch.zeros(config.num_classes, dtype=torch.bool)
    is_active[active.rows] = True
    return weights.T, is_active


class PlainAdamW:
    """AdamW of rows in float64, moments uncorrected and corrected when used, as textbooks have it."""

    def __init__(self, weight: Tensor, optim: ClassCenterOptimConfig) -> None:
        self.weight, self._optim = weight.double(), optim
        self.mean, self.square = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.count = torch.zeros(len(weight), 1, dtype=torch.float64)

    def update(self, gradient: Tensor, is_active: Tensor, lr: float) -> None:
        optim = self._optim
        if optim.clip_grad_norm:
            gradient = gradient * min(1.0, optim.clip_grad_norm / (float(gradient.norm()) + 1e-6))
        changes = is_active if optim.update == "row_sparse" else torch.ones_like(is_active)
        rows = changes.nonzero().flatten()
        self.count[rows] += 1
        squares = gradient.square()
        if optim.second_moment == "row":
            squares = squares.mean(1, keepdim=True).expand_as(gradient)
        self.mean[rows] = optim.beta1 * self.mean[rows] + (1 - optim.beta1) * gradient[rows]
        self.square[rows] = optim.beta2 * self.square[rows] + (1 - optim.beta2) * squares[rows]
        root = (self.square / (1 - optim.beta2**self.count)).sqrt() + optim.epsilon
        followed = gradient if optim.first_moment == "none" else self.mean / (1 - optim.beta1**self.count)
        step = optim.weight_decay * self.weight + followed / root
        self.weight[rows] -= lr * step[rows]


def optim(**options: Any) -> ClassCenterOptimConfig:
    # With an epsilon that is not tiny, rounding of a gradient near 0 cannot turn the direction of an update.
    exact = {
        "clip_grad_norm": 0.0,
        "first_moment": "float32",
        "second_moment": "element",
        "epsilon": 1e-3,
        "lr_scaling": "none",
    }
    return ClassCenterOptimConfig(**(exact | options))


@pytest.mark.parametrize("embedding_size", [6, 12])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"second_moment": "row"},
        {"first_moment": "none"},
        {"first_moment": "none", "second_moment": "row", "clip_grad_norm": 0.05},
        {"update": "dense"},
        {"update": "dense", "second_moment": "row", "clip_grad_norm": 0.05, "weight_decay": 0.5},
        {"update": "dense", "first_moment": "none"},
        {"beta1": 0.0, "beta2": 0.0, "weight_decay": 0.0},
    ],
)
def test_sampled_steps_are_those_of_the_definition(topology, embedding_size, options):
    case = make_case(optim=optim(**options), sample_rate=0.3, embedding_size=embedding_size)
    objectives = build(case, topology)
    table = table_of(objectives)
    reference = PlainAdamW(table.weight, case.optim)
    clipped = 0
    for one in steps_of(case):
        _, loss, _ = run_microbatches(one, objectives, LAYOUT, topology)
        weights, is_active = set_weights_of(table, case.config)
        norm = float(objectives.gradient_norms()[NAME])
        objectives.step(LR)
        expected = dense_step(one, weights, reference.weight)
        reference.update(expected.center_gradient, is_active, LR)
        assert loss == pytest.approx(expected.loss, rel=1e-5)
        assert norm == pytest.approx(float(expected.center_gradient.norm()), rel=1e-4)
        clipped += bool(case.optim.clip_grad_norm) and norm > case.optim.clip_grad_norm
    assert clipped == (STEPS if case.optim.clip_grad_norm else 0)
    moved = (reference.weight - build(case, topology)[NAME].centers.weight).abs().max()
    assert (table.weight - reference.weight).abs().max() < 2e-4 * moved
    if case.optim.update == "row_sparse":
        assert table.steps.tolist() == reference.count[:, 0].long().tolist() and len(table.steps.unique()) > 2
    second = reference.square / (1 - case.optim.beta2 ** reference.count.clamp(min=1))
    torch.testing.assert_close(table.exp_avg_sq.double(), second[:, : table.exp_avg_sq.shape[1]], rtol=2e-3, atol=1e-9)
    if table.exp_avg is not None:
        first = reference.mean / (1 - case.optim.beta1 ** reference.count.clamp(min=1))
        torch.testing.assert_close(table.exp_avg.double(), first, rtol=2e-3, atol=1e-5 * float(first.abs().max()))


@pytest.mark.parametrize("form", ["row_sparse over all rows", "dense over sampled rows"])
def test_it_is_torch_adamw_with_a_dense_gradient(topology, form):
    is_dense = form.startswith("dense")
    options = optim(update="dense" if is_dense else "row_sparse", weight_decay=0.2)
    case = make_case(optim=options, sample_rate=0.3 if is_dense else 1.0)
    objectives = build(case, topology)
    table = table_of(objectives)
    parameter = torch.nn.Parameter(table.weight.double())
    optimizer = torch.optim.AdamW([parameter], lr=LR, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.2)
    for one in steps_of(case):
        run_microbatches(one, objectives, LAYOUT, topology)
        weights, _ = set_weights_of(table, case.config)
        objectives.step(LR)
        parameter.grad = dense_step(one, weights, parameter).center_gradient
        optimizer.step()
    moved = (parameter.detach() - build(case, topology)[NAME].centers.weight).abs().max()
    assert (table.weight - parameter.detach()).abs().max() < 2e-4 * moved
    state = optimizer.state[parameter]
    for kept, plain, beta in ((table.exp_avg, "exp_avg", 0.9), (table.exp_avg_sq, "exp_avg_sq", 0.999)):
        expected = state[plain] / (1 - beta**STEPS)
        assert (kept - expected).abs().max() < 1e-3 * expected.abs().max()


COMPACT = [
    {"first_moment": "bfloat16"},
    {"weight_dtype": "bfloat16", "first_moment": "bfloat16", "second_moment": "row"},
    {"weight_dtype": "bfloat16", "first_moment": "none", "second_moment": "row", "update": "dense"},
]


@pytest.mark.parametrize("options", COMPACT)
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_compact_storage_follows_the_exact_path(topology, options, compute_dtype):
    """Rounded, but in the same direction: the distance from the exact weights is small beside the way gone."""
    paths = []
    for each in (options, {key: options[key] for key in ("second_moment", "update") if key in options}):
        first = {"first_moment": "none"} if options["first_moment"] == "none" else {}
        case = make_case(
            optim=optim(**(first | each)),
            sample_rate=0.5,
            embedding_size=12,
            compute_dtype=compute_dtype,
            interclass_filter=1.0,
        )
        objectives = build(case, topology)
        begun = table_of(objectives).weight.float().clone()
        for one in steps_of(case):
            run_microbatches(one, objectives, LAYOUT, topology)
            objectives.step(LR)
        paths.append(table_of(objectives).weight.float() - begun)
    compact, exact = paths
    assert not torch.equal(compact, exact)
    assert (compact - exact).norm() < 0.05 * exact.norm()


def test_exact_settings_of_other_tests_are_what_they_say():
    assert (EXACT_OPTIM.first_moment, EXACT_OPTIM.second_moment, EXACT_OPTIM.clip_grad_norm) == (
        "float32",
        "element",
        0,
    )
