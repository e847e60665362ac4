"""Several heads in one run: each learns what it would alone, and they share three collectives a microbatch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack, Samples
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.kinds import load_kinds
from megatron_ove.objectives.build import build_objectives
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.distributed import run_distributed
from tests.support.head_steps import assert_close, make_features, start
from tests.support.objective_steps import count_samples

SIZE, NUM_SAMPLES = 12, 10
SOURCES = ("pages", "clips", "photos")
SOURCE_OF = [0, 1, 0, 0, 1, 0, 2, 1, 0, 0]  # of each sample
WIDTHS = {"pages": 6, "clips": 1, "photos": 3}  # stored labels
FEW = {"kind": "partial_fc", "interclass_filter": 0.3, "logit_scale": 16.0, "compute_dtype": "float32", "chunk_size": 5}
HEADS: dict[str, dict[str, Any]] = {
    "words": {"source": "pages", "num_classes": 37, "sample_rate": 0.4, "labels_per_step": 4},
    "actions": {
        "source": "clips", "num_classes": 3, "sample_rate": 1.0, "labels_per_step": 2, "margin_type": "arcface",
        "interclass_filter_mode": "mask", "co_positives": "masked",
    },
    "shapes": {
        "source": "pages", "num_classes": 50, "num_sampled": 9, "labels_per_step": 3, "negatives": "shared",
        "logit_scale": 80.0, "sampling_correction": "logq",
    },
    "places": {"source": "photos", "num_classes": 20, "sample_rate": 0.5, "labels_per_step": 5},
    "own": {"source": "pages", "num_classes": 11, "sample_rate": 0.5, "labels_per_step": 4, "class_group": "tensor"},
    "own too": {
        "source": "clips", "num_classes": 15, "sample_rate": 0.4, "labels_per_step": 1, "class_group": "tensor",
    },
}  # fmt: skip
THREE = ("words", "actions", "shapes")
# Replica -> microbatch -> samples. The third microbatch is empty everywhere, the second has no clips on any replica.
LAYOUTS = {
    1: [[[0, 1, 2, 4, 6], [3, 5, 8], [], [7, 9]]],
    2: [[[0, 1], [3, 5], [], [7]], [[2, 4, 6], [8], [], [9]]],
    3: [[[0, 1], [3], [], [7]], [[2, 4, 6], [], [], [9]], [[], [5, 8], [], []]],
}
GRIDS = {"1": (1, 1), "dp2": (2, 1), "tp2": (2, 2), "dp3": (3, 1), "tp2 x dp2": (4, 2)}
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter",
    "reduce_scatter_tensor", "reduce", "broadcast", "all_to_all", "all_to_all_single", "gather", "scatter", "barrier",
    "send", "recv", "isend", "irecv", "batch_isend_irecv",
)  # fmt: skip


def make_batch(samples: Sequence[int]) -> Batch:
    generator = torch.Generator().manual_seed(4)
    labels = {source: torch.randint(-1, 3, (NUM_SAMPLES, WIDTHS[source]), generator=generator) for source in SOURCES}
    labels["pages"] = torch.randint(-1, 11, labels["pages"].shape, generator=generator)
    seeds = torch.tensor([100 + sample for sample in samples], dtype=torch.int64)
    known = Samples.of_one_source("pages", tuple(f"sample-{sample}" for sample in samples), seeds)
    source_index = torch.tensor([SOURCE_OF[sample] for sample in samples], dtype=torch.int32)
    cu_seqlens = torch.arange(len(samples) + 1, dtype=torch.int32)
    own = {
        source: labels[source][[sample for sample in samples if SOURCE_OF[sample] == index]].int()
        for index, source in enumerate(SOURCES)
    }
    return Batch(
        {MAIN_PACK: PatchPack.of_whole_samples(torch.zeros(len(samples), 3, dtype=torch.int32), cu_seqlens)},
        replace(known, source_names=SOURCES, source=source_index),
        {name: own[head["source"]] for name, head in HEADS.items()},
    )


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collects the names of torch.distributed's functions that are called."""
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, watched(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def step_with(names: Sequence[str], topology: ParallelTopology) -> dict[str, Any]:
    """One step of some of the heads; results by head, and what was called in each microbatch."""
    objectives = build_objectives(
        {name: PartialFCConfig(**(FEW | HEADS[name])) for name in names},
        kinds=load_kinds(),
        topology=topology,
        embedding_size=SIZE,
        seed=3,
        optim=ClassCenterOptimConfig(first_moment="float32", second_moment="element", epsilon=1e-3),
    )
    layout = LAYOUTS[topology.data_size][topology.data_rank]
    batches = [make_batch(samples) for samples in layout]
    counts = count_samples(objectives, batches)
    with counted() as before_step:
        prepared = objectives.prepare_step(6, batches, counts)
    with counted() as at_begin:
        objectives.begin_step(prepared)
    embeddings = torch.randn(NUM_SAMPLES, SIZE, generator=torch.Generator().manual_seed(9))
    gradient = torch.zeros_like(embeddings)
    losses = dict.fromkeys(names, 0.0)
    calls = []
    for samples, batch in zip(layout, batches, strict=True):
        pooled = embeddings[samples].requires_grad_()
        with counted() as made:
            features = make_features(pooled, batch)
            output = objectives.forward(features, batch, {name: 0.5 + index for index, name in enumerate(names)})
            output.loss.backward()
        calls.append(made)
        gradient[samples] = pooled.grad
        for name in names:
            losses[name] += float(output.metrics[f"{name}/loss"][0])
    norms = objectives.gradient_norms()
    tables = {name: objectives[name].centers for name in names}
    rows = {name: table.gradient_of_rows() for name, table in tables.items()}
    objectives.step(0.01)
    return {
        "losses": losses,
        "norms": {name: float(norm) for name, norm in norms.items()},
        "rows": rows,
        "weights": {name: table.weight for name, table in tables.items()},
        "gradient": gradient,
        "calls": calls,
        "prepare_calls": before_step,
        "begin_calls": at_begin,
        "item_counts": prepared.item_counts,
    }


def together_and_alone(rank: int, world_size: int, tensor_size: int) -> dict[str, Any]:
    """All heads, the three that share collectives, and every head alone."""
    topology = start(tensor_size)
    results: dict[str, Any] = {"all": step_with(tuple(HEADS), topology), "three": step_with(THREE, topology)}
    # Alone with the factor that it has among all.
    return results | {name: step_with((name,), topology) for name in HEADS}


_CACHE: dict[str, list[dict[str, Any]]] = {}


def results_of(grid: str) -> list[dict[str, Any]]:
    if grid not in _CACHE:
        world_size, tensor_size = GRIDS[grid]
        _CACHE[grid] = run_distributed(together_and_alone, world_size, tensor_size)
    return _CACHE[grid]


def scaled(results: Mapping[str, Any], name: str, position: int) -> Tensor:
    """The gradient of a head alone, whose factor was 0.5, at the factor of its place among others."""
    return results[name]["gradient"] * ((0.5 + position) / 0.5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("names", [tuple(HEADS), THREE], ids=["all", "three"])
def test_heads_together_learn_what_each_learns_alone(grid, names):
    for results in results_of(grid):
        together = results["three" if names == THREE else "all"]
        for position, name in enumerate(names):
            alone, factor = results[name], (0.5 + position) / 0.5
            assert together["losses"][name] == pytest.approx(alone["losses"][name], rel=1e-6)
            assert together["norms"][name] == pytest.approx(alone["norms"][name] * factor, rel=1e-5)
            if together["rows"][name].numel():  # a rank may hold no active row of a small table
                assert_close(together["rows"][name], alone["rows"][name] * factor, 1e-5)
        expected = sum(scaled(results, name, position) for position, name in enumerate(names))
        assert_close(together["gradient"], expected, 1e-5)
        assert all(together["norms"][name] > 0 for name in names)
    for name in names:
        assert sum(results[name]["losses"][name] for results in results_of(grid)) > 0


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != "1"])
def test_all_heads_together_do_not_depend_on_the_grid(grid):
    (alone,), ranks = results_of("1"), results_of(grid)
    world_size, tensor_size = GRIDS[grid]
    for name, config in HEADS.items():
        owners = ranks[:tensor_size] if config.get("class_group") == "tensor" else ranks
        joined = torch.cat([rank["all"]["weights"][name] for rank in owners])
        torch.testing.assert_close(joined, alone["all"]["weights"][name], rtol=1e-5, atol=1e-6)
        replicas = ranks[::tensor_size]
        assert sum(rank["all"]["losses"][name] for rank in replicas) == pytest.approx(alone["all"]["losses"][name])
    assert world_size == len(ranks)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("1", []),
        ("dp2", ["all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor"]),
        ("dp3", ["all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor"]),
        ("tp2", ["all_reduce", "all_reduce"]),
        ("tp2 x dp2", ["all_gather_into_tensor", "all_reduce", "all_reduce"]),
    ],
)
def test_a_microbatch_of_three_heads_costs_three_collectives(grid, expected):
    for results in results_of(grid):
        for name in ("three", "words"):
            first, second, empty, fourth = results[name]["calls"]
            assert first == second == fourth == expected
            assert empty == []  # nothing to say when no replica has a sample
    assert len(results_of(grid)) == GRIDS[grid][0]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_step_of_any_number_of_heads_costs_one_message_before_it(grid):
    """And none when it begins: nothing then waits for another rank."""
    has_replicas = GRIDS[grid][0] > GRIDS[grid][1]
    inputs = make_batch(range(NUM_SAMPLES)).inputs
    for results in results_of(grid):
        for names in ("all", "three", "words"):
            assert results[names]["prepare_calls"] == (["all_gather_into_tensor"] if has_replicas else [])
            assert results[names]["begin_calls"] == []
        assert results["all"]["item_counts"] == {name: int((inputs[name] >= 0).any(1).sum()) for name in HEADS}


def test_heads_with_a_table_per_replica_share_two_more_over_tensor_ranks():
    for results in results_of("tp2 x dp2"):
        assert results["own"]["calls"][0] == ["all_reduce", "all_reduce"]
        assert len(results["all"]["calls"][0]) == 5
    for results in results_of("dp2"):
        assert results["own"]["calls"][0] == [] and len(results["all"]["calls"][0]) == 3
