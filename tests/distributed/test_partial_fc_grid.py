"""Partial FC on grids of gloo ranks equals the dense float64 softmax, in loss and in every gradient."""

from __future__ import annotations

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.head_steps import assert_close, dense_step, gather_results, make_case, step_on_rank

# fp32 rounding of a log-sum-exp of logits up to 16, and of sums over some tens of rows.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5

# Two microbatches a replica, of different sizes, one of them empty, with samples of another source in between.
LAYOUTS = {
    1: [[[0, 1, -1, 2, 3], [4, 5, 6, 7, 8]]],
    2: [[[0, 1, -1], [2, 3, 4]], [[5, -1], [6, 7, 8]]],
    3: [[[0, 1], [2]], [[], [3, 4, 5]], [[6, -1, 7], [8]]],
    4: [[[0, 1], [2]], [[-1, 3], []], [[], [4, 5]], [[6, 7], [8]]],
}
GRIDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "4": (4, 1), "tp2": (2, 2), "tp2 x dp2": (4, 2), "tp3": (3, 3)}


def run_case(case, world_size, tensor_size, lr=0.1):
    layout = LAYOUTS[world_size // tensor_size]
    return gather_results(case, run_distributed(step_on_rank, world_size, case, layout, tensor_size, lr))


def check_against_dense(case, joined, sets=None):
    reference = dense_step(case, sets)
    assert joined.loss == pytest.approx(reference.loss, rel=LOSS_TOLERANCE)
    assert_close(joined.embedding_gradient, reference.embedding_gradient, GRADIENT_TOLERANCE)
    assert_close(joined.row_gradient, reference.center_gradient, GRADIENT_TOLERANCE)
    norm = float(reference.center_gradient.norm())
    assert joined.norms == pytest.approx([norm] * len(joined.norms), rel=1e-6)
    return reference


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_equals_the_dense_softmax(grid):
    case = make_case()
    check_against_dense(case, run_case(case, *GRIDS[grid]))


@pytest.mark.parametrize("grid", ["2", "tp2 x dp2"])
def test_a_table_per_replica_equals_the_dense_softmax(grid):
    case = make_case(class_group="tensor", interclass_filter_mode="mask")
    check_against_dense(case, run_case(case, *GRIDS[grid]))


@pytest.mark.parametrize("num_classes", [2, 3, 38])
def test_uneven_class_counts_and_ranks_without_classes(num_classes):
    case = make_case(num_classes=num_classes, margin_type="arcface")
    check_against_dense(case, run_case(case, 4, 1))


@pytest.mark.parametrize("negatives", ["per_label", "shared"])
@pytest.mark.parametrize("co_positives", ["negative", "masked"])
def test_sampled_classes_equal_the_dense_softmax_over_the_same_classes(negatives, co_positives):
    case = make_case(sample_rate=0.5, negatives=negatives, co_positives=co_positives)
    joined = run_case(case, 4, 2)
    sets = joined.sets if negatives == "per_label" else joined.sets * case.config.labels_per_step
    check_against_dense(case, joined, sets)
    touched = joined.row_gradient.any(1).nonzero().flatten()
    assert set(touched.tolist()) <= set(torch.cat(sets).tolist()) and len(joined.sets[0]) < case.config.num_classes


@pytest.mark.parametrize("negatives", ["per_label", "shared"])
def test_sampling_and_update_do_not_depend_on_the_grid(negatives):
    case = make_case(sample_rate=0.4, negatives=negatives)
    alone = run_case(case, 1, 1)
    for grid in ("3", "tp2 x dp2"):
        joined = run_case(case, *GRIDS[grid])
        assert [part.tolist() for part in joined.sets] == [part.tolist() for part in alone.sets]
        assert joined.loss == pytest.approx(alone.loss, rel=LOSS_TOLERANCE)
        # One AdamW step has size lr whatever the gradient, so weights that differ show a gradient of another sign.
        assert_close(joined.weight, alone.weight, 1e-4)
        assert joined.norms == pytest.approx(alone.norms * len(joined.norms), rel=1e-6)
