"""Whole steps of a head by Triton kernels, interpreted on the CPU, against dense float64 and against plain torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ove.config.optim import ClassCenterOptimConfig
from tests.support.head_steps import (
    NAME,
    Case,
    Layout,
    assert_close,
    build,
    check_against_dense,
    gather_results,
    make_case,
    one_step,
    run_microbatches,
    start,
    table_of,
)
from tests.support.triton_interpreter import interpreting_process

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

WHOLE: Layout = [[list(range(9))]]
PARTS: Layout = [[[0, 1, 2, -1, 3], [], [4, 5, 6, 7, 8]]]
# A microbatch takes a multiple of 16 columns, so that 40 elements hold the factors of two microbatches, 6 of none.
FORMS = {"dense": 6, "factored": 40}
Interpreted = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    with interpreting_process(begin) as call:
        yield call


_TOPOLOGY: list[Any] = []


def begin() -> None:
    _TOPOLOGY.append(start(1))


def fused_step(case: Case, layout: Layout) -> dict[str, Any]:
    return one_step(case, layout, _TOPOLOGY[0], 0.003)


def fused_case(**options: Any) -> Case:
    return make_case(
        **({"backend": "triton", "num_classes": 29, "sample_rate": 0.5, "interclass_filter": 0.2} | options)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin_type": "arcface", "interclass_filter_mode": "mask", "co_positives": "masked"},
        {"negatives": "grouped", "negative_groups": 2, "sampling_correction": "logq"},
        {"negatives": "shared", "sample_rate": 1.0, "interclass_filter": 1.0},
        {"margin_type": "combined", "combined_margin": (1.1, 0.2, 0.15), "num_sampled": 5, "num_classes": 17},
        {"num_classes": 2, "labels_per_step": 1},
    ],
)
def test_a_fused_step_equals_the_dense_softmax(interpreted, form, options):
    case = fused_case(embedding_size=FORMS[form], **options)
    for layout in (WHOLE, PARTS):
        check_against_dense(case, gather_results(case, [interpreted(fused_step, case, layout)]))


def several_steps(case: Case) -> dict[str, Any]:
    """Four steps, the third of which is refused; what the table holds."""
    objectives = build(case, _TOPOLOGY[0])
    table = table_of(objectives)
    norms = []
    for step in range(4):
        one = replace(case, step=step, embeddings=case.embeddings.roll(step, 1))
        run_microbatches(one, objectives, PARTS, _TOPOLOGY[0])
        norms.append(float(objectives.gradient_norms()[NAME]))
        if step == 2:
            objectives.discard()
        else:
            objectives.step(0.003)
    true = torch.linalg.vector_norm(table.weight.double(), dim=1)
    torch.testing.assert_close(table._update.norms[:-1].double(), true, rtol=1e-5, atol=0)
    keys = ("weight", "exp_avg", "exp_avg_sq", "steps")
    return {key: getattr(table, key) for key in keys} | {"norms": norms}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "storage",
    [
        {"first_moment": "float32", "second_moment": "element", "clip_grad_norm": 0.05},
        {"first_moment": "none", "second_moment": "row"},
        {"weight_dtype": "bfloat16", "first_moment": "bfloat16", "second_moment": "row"},
    ],
)
def test_fused_updates_equal_those_of_plain_torch(interpreted, form, compute_dtype, storage):
    optim = ClassCenterOptimConfig(**({"epsilon": 1e-3} | storage))
    case = fused_case(embedding_size=FORMS[form], compute_dtype=compute_dtype, optim=optim, interclass_filter=1.0)
    fused = interpreted(several_steps, case)
    plain = interpreted(several_steps, replace(case, config=case.config.model_copy(update={"backend": "torch"})))
    is_exact = compute_dtype == "float32" and optim.weight_dtype == "float32"
    assert torch.equal(fused["steps"], plain["steps"]) and len(fused["steps"].unique()) > 1
    assert fused["norms"] == pytest.approx(plain["norms"], rel=1e-5 if is_exact else 5e-3)
    assert_close(fused["weight"].float(), plain["weight"].float(), 2e-5 if is_exact else 2e-2)
    assert_close(fused["exp_avg_sq"], plain["exp_avg_sq"], 1e-4 if is_exact else 2e-2)
    if optim.first_moment != "none":
        assert_close(fused["exp_avg"].float(), plain["exp_avg"].float(), 1e-4 if is_exact else 3e-2)


def norm_and_true_norm(case: Case) -> tuple[float, float, torch.dtype]:
    objectives = build(case, _TOPOLOGY[0])
    run_microbatches(case, objectives, WHOLE, _TOPOLOGY[0])
    table = table_of(objectives)
    norm = float(objectives.gradient_norms()[NAME])
    return norm, float(table.gradient_of_rows().norm()), table.step_table.gradient.radial.dtype


@pytest.mark.parametrize("form", FORMS)
def test_sums_are_fp32_where_products_are_bf16(interpreted, form):
    case = fused_case(embedding_size=FORMS[form], compute_dtype="bfloat16")
    norm, true, dtype = interpreted(norm_and_true_norm, case)
    assert dtype == torch.float32
    assert norm == pytest.approx(true, rel=2e-3)
