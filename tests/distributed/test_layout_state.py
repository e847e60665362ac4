"""What must hold beside equal losses: bf16 with fp32 master weights, refused steps, replicas that cannot drift apart,
several gradient buckets, and runs that go on under another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.layout_grid import NUM_STEPS, RunRecord, compare_gradients, compare_losses, run_layouts
from tests.support.tiny_run import write_tiny_sources

TOLERANCE = 1e-5
# bf16 keeps 8 bits, and sums are rounded at other places. Measured over 20 steps: losses and norms 4.1e-3, gradients
# 1.9e-2 of their norm; one rank with other microbatches differs from itself by 2.3e-3 and 3.0e-2.
BF16_LOSS, BF16_GRADIENT = 1e-2, 5e-2
REFUSED_STEP = 2
# Enough for what shows in the steps after the one that goes wrong.
FEW = {"stop_after": 6}

TP2, PP2, VPP2 = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"virtual_pipeline_model_parallel_size": 2},
)
SP, OPTIMIZER = {"sequence_parallel": True}, {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
UNEVEN = {"num_layers_in_last_stage": 2, "layers": 6}
EVERYTHING = {**PP2, **VPP2, **OPTIMIZER, **OVERLAP, **UNEVEN}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def run_one(
    sources: dict[str, str], folder: Path, world_size: int, layout: dict[str, Any], **options: Any
) -> RunRecord:
    return run_layouts(sources, folder, world_size, {"run": layout}, **options)["run"]


@pytest.fixture(scope="module")
def reference(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunRecord]:
    return run_layouts(sources, tmp_path_factory.mktemp("fp32"), 1, {"one": FEW, "uneven": {"layers": 6}})


@pytest.fixture(scope="module")
def bf16_reference(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunRecord]:
    layouts = {"one": {}, "uneven": {"layers": 6}}
    return run_layouts(sources, tmp_path_factory.mktemp("bf16"), 1, layouts, precision="bf16")


BF16_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "other microbatches": (1, {"tokens": 192}),
    "tp2_sp": (2, {**TP2, **SP}),
    "dp2_overlap": (2, {**OPTIMIZER, **OVERLAP}),
    "everything": (4, EVERYTHING),
}
QUICK_BF16, MORE_BF16 = ("tp2_sp", "everything"), ("other microbatches", "dp2_overlap")


@pytest.mark.parametrize("layout", [*QUICK_BF16, *(pytest.param(name, marks=pytest.mark.full) for name in MORE_BF16)])
def test_bf16_differs_by_rounding_only(sources, tmp_path, bf16_reference, layout):
    world_size, parallel = BF16_LAYOUTS[layout]
    reference = bf16_reference["uneven" if "layers" in parallel else "one"]
    record = run_one(sources, tmp_path, world_size, parallel, precision="bf16")
    losses, gradients = compare_losses(record, reference), compare_gradients(record, reference)
    print(f"BF16 | {layout} | {losses:.1e} | {max(gradients.values()):.1e}")
    assert record.optimizer_dtypes == {torch.float32}
    assert {weight.dtype for weight in record.weights.values()} == {torch.bfloat16}
    assert losses < BF16_LOSS
    assert max(gradients.values()) < BF16_GRADIENT


def spoil_a_step(trainer: Any, topology: Any) -> None:
    """The last rank alone finds a gradient norm of infinity, once."""
    gradient_norms = trainer.optimizer.gradient_norms

    def spoilt() -> dict[str, float]:
        norms = gradient_norms()
        is_bad = trainer.state.step == REFUSED_STEP and topology.global_rank == topology.world_size - 1
        return {"": float("inf")} if is_bad else norms

    trainer.optimizer.gradient_norms = spoilt


@pytest.mark.parametrize("layout", ["everything", pytest.param("tp2_pp2", marks=pytest.mark.full)])
def test_a_refused_step_is_one_under_every_layout(sources, tmp_path, layout):
    parallel = EVERYTHING if layout == "everything" else {**TP2, **PP2, "layers": 6}
    expected = run_one(sources, tmp_path / "one", 1, {"layers": 6, **FEW}, change=spoil_a_step)
    record = run_one(sources, tmp_path / "four", 4, {**parallel, **FEW}, change=spoil_a_step)
    assert expected.losses[REFUSED_STEP].keys() != expected.losses[0].keys()
    assert compare_losses(record, expected) < TOLERANCE
    assert max(compare_gradients(record, expected).values()) < TOLERANCE


def disturb_a_rank(trainer: Any, topology: Any) -> None:
    """Tensor rank 1 computes other gradients of what it has a copy of, as kernels with changing order would."""
    for chunk in trainer.chunks:
        for parameter in chunk.parameters():
            if not parameter.tensor_model_parallel and topology.tensor_rank == 1:
                parameter.register_hook(lambda gradient: gradient * 1.01)


@pytest.mark.parametrize("sequence", [pytest.param(False, marks=pytest.mark.full), True])
def test_copies_on_tensor_ranks_cannot_drift_apart(sources, tmp_path, sequence):
    """That copies are equal to the bit is checked wherever records are put together."""
    layout = {**TP2, "sequence_parallel": sequence, **FEW}
    quiet = run_one(sources, tmp_path / "quiet", 2, layout)
    disturbed = run_one(sources, tmp_path / "disturbed", 2, layout, change=disturb_a_rank)
    assert compare_losses(disturbed, quiet) > 1e-4


def make_buckets_small() -> None:
    from megatron_ove.parallel import gradient_buckets

    # The pooling head's joint projection ends a bucket, and the head's probe begins the next.
    gradient_buckets.bucket_size = lambda data_size: 100_000


def check_buckets(trainer: Any, topology: Any) -> None:
    assert len(trainer.chunks[0].buffers[0].buckets) > 3


@pytest.mark.parametrize("gather", [False, True])
def test_several_buckets_change_nothing(sources, tmp_path, reference, gather):
    layout = {**OPTIMIZER, **OVERLAP, "overlap_param_gather": gather, **FEW}
    options = {"prepare": make_buckets_small, "change": check_buckets}
    record = run_one(sources, tmp_path, 2, layout, **options)
    assert compare_losses(record, reference["one"]) < TOLERANCE
    assert max(compare_gradients(record, reference["one"]).values()) < TOLERANCE


@pytest.mark.parametrize("later", [pytest.param("one", marks=pytest.mark.full), "pp3"])
def test_a_run_goes_on_under_another_layout(sources, tmp_path, reference, later):
    """Ten steps in uneven interleaved stages with overlapped exchange, ten in another split."""
    world_size, layout = {"one": (1, OPTIMIZER), "pp3": (3, {"pipeline_model_parallel_size": 3, **OPTIMIZER})}[later]
    run_one(sources, tmp_path, 4, {**EVERYTHING, "stop_after": 10})
    record = run_one(sources, tmp_path, world_size, {**layout, "layers": 6})
    assert len(record.losses) == NUM_STEPS and set(record.gradients) == {NUM_STEPS - 1}
    assert compare_losses(record, reference["uneven"]) < TOLERANCE
    assert max(compare_gradients(record, reference["uneven"]).values()) < TOLERANCE


def test_sampled_negatives_do_not_depend_on_the_layout(sources, tmp_path):
    """Which classes are drawn is a function of seed, step and label slot, not of how many ranks share the table."""
    expected = run_one(sources, tmp_path / "one", 1, FEW, sample_rate=0.4)
    record = run_one(sources, tmp_path / "four", 4, {**TP2, **FEW}, sample_rate=0.4)
    assert len(record.losses) == FEW["stop_after"]
    assert compare_losses(record, expected) < TOLERANCE
    assert max(compare_gradients(record, expected).values()) < TOLERANCE
