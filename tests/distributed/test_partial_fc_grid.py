"""Partial FC on grids of gloo ranks equals the dense float64 softmax, in loss and in every gradient."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_ove.config.optim import ClassCenterOptimConfig
from tests.support.distributed import run_distributed
from tests.support.head_steps import (
    Case,
    Gathered,
    Layout,
    Reference,
    check_against_dense,
    dense_step,
    gather_results,
    make_case,
    steps_on_rank,
)

# Two microbatches a replica, of different sizes, some of them empty, with samples of another source in between.
# Samples 4 and 8 have no labels, so that with four replicas one microbatch has samples but nothing to learn from.
LAYOUTS: dict[int, Layout] = {
    1: [[[0, 1, -1, 2, 3], [4, 5, 6, 7, 8]]],
    2: [[[0, 1, -1], [2, 3, 4]], [[5, -1], [6, 7, 8]]],
    3: [[[0, 1], [2]], [[], [3, 4, 5]], [[6, -1, 7], [8]]],
    4: [[[0, 1], [2]], [[-1, 3], []], [[], [4, 5]], [[6, 7], [8]]],
}
GRIDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "4": (4, 1), "tp2": (2, 2), "tp2 x dp2": (4, 2), "tp3": (3, 3)}

GROUPED = {"negatives": "grouped", "negative_groups": 2}
COMBINED = {"margin_type": "combined", "combined_margin": (1.1, 0.2, 0.15)}
OPTIONS: dict[str, dict[str, Any]] = {
    "cosface, zero, negative": {},
    "cosface, mask, masked, factors": {
        "interclass_filter_mode": "mask", "co_positives": "masked", "embedding_size": 12, "interclass_filter": 0.2
    },
    "arcface, zero, masked": {"margin_type": "arcface", "co_positives": "masked"},
    "arcface, mask, negative, factors": {
        "margin_type": "arcface", "interclass_filter_mode": "mask", "embedding_size": 12, "interclass_filter": 0.2
    },
    "combined, zero, negative, factors": COMBINED | {"embedding_size": 12},
    "combined, mask, masked": COMBINED | {"interclass_filter_mode": "mask", "co_positives": "masked"},
    "float64 sums": {"logit_scale": 80.0},
    "per_label": {"sample_rate": 0.5},
    "per_label, masked, factors, logq": {
        "sample_rate": 0.3, "co_positives": "masked", "embedding_size": 12, "sampling_correction": "logq"
    },
    "grouped in 2, logq": {"sample_rate": 0.4, "sampling_correction": "logq"} | GROUPED,
    "grouped in 3, count": {"num_sampled": 11, "negatives": "grouped", "negative_groups": 3, "embedding_size": 12},
    "shared, masked": {"sample_rate": 0.5, "negatives": "shared", "co_positives": "masked"},
    "shared, logq, factors": {
        "sample_rate": 0.5, "negatives": "shared", "sampling_correction": "logq", "embedding_size": 12
    },
    "more labels than negatives": {"num_sampled": 1},
    "more slots than labels": {"width": 3, "labels_per_step": 8, "sample_rate": 0.5} | GROUPED,
    "one label a sample": {"labels_per_step": 1, "sample_rate": 0.2, "negatives": "shared"},
    "2 classes, ranks without rows": {"num_classes": 2, "sample_rate": 0.5},
    "3 classes, ranks without rows": {"num_classes": 3, "margin_type": "arcface", "embedding_size": 12},
    "38 classes": {"num_classes": 38, "chunk_size": 3, "sample_rate": 0.7},
    "a table per replica": {"class_group": "tensor", "interclass_filter_mode": "mask"},
    "a sampled table per replica": {"class_group": "tensor", "sample_rate": 0.4, "embedding_size": 12} | GROUPED,
    "a tiny table per replica": {"class_group": "tensor", "num_classes": 2},
    "two sources": {"source": ("pages", "scans"), "sample_rate": 0.4},
    "clipped": {"sample_rate": 0.4, "optim": {"clip_grad_norm": 0.05}},
    "compact": {"sample_rate": 0.4, "optim": {"first_moment": "none", "second_moment": "row"}},
    "bf16 weights": {"sample_rate": 0.4, "embedding_size": 12, "optim": {"weight_dtype": "bfloat16"}},
}  # fmt: skip


def case_of(name: str) -> Case:
    options = dict(OPTIONS[name])
    # An epsilon that is not tiny, so that rounding of a gradient near 0 does not turn the direction of an update.
    exact = {
        "clip_grad_norm": 0.0,
        "first_moment": "float32",
        "second_moment": "element",
        "epsilon": 1e-3,
        "lr_scaling": "none",
    }
    return make_case(**options | {"optim": ClassCenterOptimConfig(**exact | options.get("optim", {}))})


@functools.cache
def results_of(grid: str) -> dict[str, Gathered]:
    """All cases on one grid, in one start of its processes."""
    world_size, tensor_size = GRIDS[grid]
    cases = [case_of(name) for name in OPTIONS]
    layout = LAYOUTS[world_size // tensor_size]
    ranks = run_distributed(steps_on_rank, world_size, cases, layout, tensor_size, 0.003)
    return {
        name: gather_results(case, results)
        for name, case, results in zip(OPTIONS, cases, zip(*ranks, strict=True), strict=True)
    }


@functools.cache
def reference_of(name: str) -> Reference:
    """The dense step over the classes that one rank alone takes; other grids must take the same."""
    return dense_step(case_of(name), results_of("1")[name].slot_weights)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "bf16 weights"])  # whose table starts rounded
def test_a_step_equals_the_dense_softmax_over_the_same_classes(grid, name):
    case, joined = case_of(name), results_of(grid)[name]
    assert torch.equal(joined.slot_weights, results_of("1")[name].slot_weights)
    check_against_dense(case, joined, reference=reference_of(name))
    assert not joined.row_gradient[~joined.is_active].any()
    if "sample_rate" not in OPTIONS[name] and "num_sampled" not in OPTIONS[name]:
        assert joined.is_active.all()


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != "1"])
@pytest.mark.parametrize("name", OPTIONS)
def test_draw_loss_and_update_do_not_depend_on_the_grid(grid, name):
    alone, joined = results_of("1")[name], results_of(grid)[name]
    assert torch.equal(joined.is_active, alone.is_active) and torch.equal(joined.set_weights, alone.set_weights)
    assert joined.loss == pytest.approx(alone.loss, rel=1e-6)
    assert joined.norms == pytest.approx(alone.norms * len(joined.norms), rel=1e-5)
    difference = (joined.weight.float() - alone.weight.float()).abs()
    if joined.weight.dtype == torch.bfloat16:
        # The same random numbers round sums that differ in their last bit: almost always to the same neighbour.
        assert (difference > 0).float().mean() < 0.005
    else:
        assert difference.max() < 1e-4 * 0.003  # the largest change that one update can make is 0.003


def test_rows_of_another_source_or_without_a_label_have_no_part():
    """The layouts hold samples of the other source; they were asserted to get no gradient while they ran."""
    case, joined = case_of("per_label"), results_of("4")["per_label"]
    assert case.num_items == 8 and not joined.embedding_gradient[4].any()
    assert joined.embedding_gradient[0].any()
