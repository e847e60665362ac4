"""Ranks of labels in a sharded table equal the dense float64 ones, and so do the figures that follow from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ove.evaluation.retrieval import average_precision, labels_to_relevant
from megatron_ove.heads.label_ranks import each_label_once, retrieval_sums
from megatron_ove.parallel.class_order import classes_of_rows
from tests.support.distributed import run_distributed
from tests.support.head_steps import Case, build, make_case, start, table_of
from tests.support.reference_heads import dense_average_precision, dense_label_ranks

# Samples of each replica; a replica may have none.
COUNTS = {1: [11], 2: [7, 4], 3: [6, 0, 5], 4: [5, 0, 4, 2]}
GRIDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "4": (4, 1), "tp2": (2, 2), "tp2 x dp2": (4, 2), "tp3": (3, 3)}
OPTIONS: dict[str, dict[str, Any]] = {
    "37 classes": {},
    "more dimensions": {"embedding_size": 24, "num_classes": 38},
    "2 classes, ranks without rows": {"num_classes": 2},
    "a table per replica": {"class_group": "tensor"},
}


def cases() -> list[Case]:
    return [make_case(num_samples=11, seed=3, **options) for options in OPTIONS.values()]


def measure(rank: int, world_size: int, tensor_size: int) -> list[dict[str, Any]]:
    """Returns for each case the figures of this replica's samples and this rank's part of the table."""
    topology = start(tensor_size)
    counts = np.array(COUNTS[topology.data_size])
    stop = int(counts[: topology.data_rank + 1].sum())
    own = slice(stop - int(counts[topology.data_rank]), stop)
    results = []
    for case in cases():
        objectives = build(case, topology)
        objective, table = objectives["tags"], table_of(objectives)
        before = table.weight.clone()
        sums = objective.measure_held_out([case.embeddings[own]], [case.labels[own]], counts)
        assert torch.equal(table.weight, before)
        figures = {name: (float(total), float(count)) for name, (total, count) in sums.items()}
        results.append({"figures": figures, "first": table.first_row, "weight": table.weight, "own": own})
    return results


def dense_figures(case: Case, centers: Tensor) -> list[dict[str, float]]:
    """Figures of each sample with a label."""
    num_classes, found = len(centers), []
    for ranks in dense_label_ranks(case.embeddings.double(), centers, case.labels):
        if not ranks:
            found.append({})
            continue
        right = list(ranks.values())
        found.append(
            {
                "mean_average_precision": dense_average_precision(right, num_classes),
                "first_right": float(min(right) == 1),
                "recall_at_10": sum(rank <= 10 for rank in right) / len(right),
                "chance_first_right": len(right) / num_classes,
                "chance_recall_at_10": min(1.0, 10 / num_classes),
            }
        )
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_figures_equal_the_dense_ones(grid: str) -> None:
    world_size, tensor_size = GRIDS[grid]
    ranks: list[Any] = run_distributed(measure, world_size, tensor_size)
    for number, case in enumerate(cases()):
        parts = {results[number]["first"]: results[number]["weight"] for results in ranks}
        table = torch.cat([parts[first] for first in sorted(parts)])[: case.config.table_size].double()
        centers = torch.empty_like(table)
        centers[classes_of_rows(torch.arange(len(table)), len(table))] = table
        expected = dense_figures(case, centers)
        for results in ranks:
            own = [figures for figures in expected[results[number]["own"]] if figures]
            got = results[number]["figures"]
            for name in expected[0]:
                total, count = got[name]
                assert count == len(own)
                assert total == pytest.approx(sum(figures[name] for figures in own), rel=1e-9, abs=1e-12), name


def ranks_on_rank(rank: int, world_size: int, embeddings: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    import torch.distributed as dist

    from megatron_ove.heads.label_ranks import label_ranks
    from megatron_ove.parallel.shard_range import shard_range

    first, stop = shard_range(len(table), world_size, rank)
    weight = table[first:stop]
    assert dist.group.WORLD is not None
    return label_ranks(
        embeddings,
        labels,
        weight=weight,
        norms=torch.linalg.vector_norm(weight.float(), dim=1),
        first_row=first,
        class_group=dist.group.WORLD,
    )


@pytest.mark.parametrize("world_size", [1, 3])
def test_ties_zeros_and_what_is_not_finite(world_size: int) -> None:
    """Equal centers count for nobody; an embedding without a direction is the worst, not the best."""
    table = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 1, 2, 3]), 4).float()
    table[3] *= 7  # the same direction
    embeddings = torch.tensor(
        [[0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [math.nan, 1.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0]]
    )
    labels = torch.tensor([[2, 4, -1], [0, 1, -1], [5, -1, -1], [2, 3, 1]])
    ranks = run_distributed(ranks_on_rank, world_size, embeddings, table, labels)
    for found in ranks:
        assert found[0].tolist() == [1, 4, 0]  # of three equal ones the label is taken to be the first
        assert sorted(found[1].tolist()) == [0, 5, 6]
        assert found[2].tolist() == [6, 0, 0]
        assert sorted(found[3].tolist()) == [2, 3, 4]  # labels of one sample that tie have ranks of their own
    assert float(retrieval_sums(ranks[0], 6)["mean_average_precision"][0]) <= 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_many_chunks_of_rows_and_several_blocks_of_samples(world_size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    embeddings, table = torch.randn(9000, 8, generator=generator), torch.randn(700, 8, generator=generator)
    labels = each_label_once(torch.randint(-1, 700, (9000, 3), generator=generator))
    ranks = run_distributed(ranks_on_rank, world_size, embeddings, table, labels)[0]
    sample = slice(4000, 4200)
    dense = dense_label_ranks(embeddings[sample].double(), table.double(), labels[sample])
    for row, found, expected in zip(labels[sample].tolist(), ranks[sample].tolist(), dense, strict=True):
        for label, rank in zip(row, found, strict=True):
            assert rank == 0 if label < 0 else abs(rank - expected[label]) <= 1  # fp32 may turn a near tie


def test_chance_is_what_random_orders_give() -> None:
    """The formulas against drawn orders; the average precision also against evaluation's own."""
    generator = torch.Generator().manual_seed(1)
    num_classes, num_labels, draws = 60, 7, 20000
    scores = torch.rand(draws, num_classes, generator=generator)
    labels = torch.arange(num_labels).expand(draws, -1)
    order = scores.argsort(dim=1, descending=True).argsort(dim=1)
    sums = {
        name: float(total / count) for name, (total, count) in retrieval_sums(order[:, :num_labels] + 1, 60).items()
    }
    theirs = average_precision(scores, labels_to_relevant(labels, num_classes))
    assert sums["mean_average_precision"] == pytest.approx(float(theirs.mean()), rel=1e-5)
    for name in ("mean_average_precision", "first_right", "recall_at_10"):
        assert sums[name] == pytest.approx(sums[f"chance_{name}"], abs=0.008), name


def test_labels_are_taken_once() -> None:
    labels = torch.tensor([[3, 3, -1, 5], [-1, -1, -1, -1], [0, 2, 0, 2]])
    assert each_label_once(labels).tolist() == [[5, 3], [-1, -1], [2, 0]]
    assert each_label_once(torch.full((2, 3), -1)).shape == (2, 0)
    assert each_label_once(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 0)
    none = retrieval_sums(torch.empty(4, 0, dtype=torch.int64), 10)
    assert all((float(total), float(count)) == (0, 0) for total, count in none.values())
