"""Collectives with gradients against their definition, on uneven and empty shares."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.parallel.collectives import all_gather_rows, gather_replica_rows, sum_gradient_over_group
from megatron_ove.parallel.topology import initialize_topology
from tests.support.distributed import WorkerError, run_distributed


def _rows(rank: int, count: int) -> Tensor:
    return (100.0 * rank + torch.arange(count * 2).view(count, 2).float()).requires_grad_()


def _gather_worker(rank: int, world_size: int, counts: list[int]) -> tuple[Tensor, Tensor]:
    x = _rows(rank, counts[rank])
    gathered = all_gather_rows(x, dist.group.WORLD, counts)
    weight = torch.arange(gathered.numel()).view_as(gathered).float() + rank  # each rank weighs differently
    (gathered * weight).sum().backward()
    return gathered.detach(), x.grad


@pytest.mark.parametrize("counts", [[2, 2], [3, 0, 1], [0, 0]])
def test_all_gather_rows_and_its_gradient(counts: list[int]) -> None:
    results = run_distributed(_gather_worker, len(counts), counts)
    expected = torch.cat([_rows(rank, count) for rank, count in enumerate(counts)]).detach()
    total = torch.arange(expected.numel()).view_as(expected).float() * len(counts) + sum(range(len(counts)))
    for (gathered, gradient), expected_gradient in zip(results, total.split(counts), strict=True):
        assert torch.equal(gathered, expected)
        assert torch.equal(gradient, expected_gradient)


def _sum_worker(rank: int, world_size: int) -> Tensor:
    y = torch.ones(2, requires_grad=True)
    (sum_gradient_over_group(y, dist.group.WORLD) * (rank + 1)).sum().backward()
    return y.grad


def test_sum_of_gradients() -> None:
    for gradient in run_distributed(_sum_worker, 3):
        assert torch.equal(gradient, torch.full((2,), 6.0))


def _replica_worker(
    rank: int, world_size: int, tensor_size: int, all_counts: list[list[int]]
) -> list[tuple[int, Tensor, Tensor]]:
    topology = initialize_topology(ParallelConfig(tensor_model_parallel_size=tensor_size), seed=0)
    results = []
    for counts in all_counts:
        x = _rows(topology.data_rank, counts[topology.data_rank])
        gathered = gather_replica_rows(x, topology.data_group, topology.class_group, counts)
        part = torch.randn(gathered.shape, generator=torch.Generator().manual_seed(rank))  # each rank's of the gradient
        (gathered * part).sum().backward()
        assert x.grad is not None
        results.append((topology.data_rank, gathered.detach(), x.grad))
    return results


@pytest.mark.parametrize(("world_size", "tensor_size"), [(2, 1), (2, 2), (4, 2)])
def test_rows_of_replicas_are_gathered_and_their_gradient_summed_over_all_classes(
    world_size: int, tensor_size: int
) -> None:
    num_replicas = world_size // tensor_size
    all_counts = [counts[:num_replicas] for counts in ([2, 2], [0, 3], [1, 0], [0, 0])]
    ranks = run_distributed(_replica_worker, world_size, tensor_size, all_counts)
    for index, counts in enumerate(all_counts):
        expected = torch.cat([_rows(replica, count) for replica, count in enumerate(counts)]).detach()
        shape = (sum(counts), 2)
        total = sum(torch.randn(shape, generator=torch.Generator().manual_seed(rank)) for rank in range(world_size))
        seen: dict[int, Tensor] = {}
        for results in ranks:
            replica, gathered, gradient = results[index]
            assert torch.equal(gathered, expected)
            torch.testing.assert_close(gradient, total.split(counts)[replica])
            # Weights of the encoder follow from it on every tensor-parallel rank, so not a bit may differ.
            assert torch.equal(gradient, seen.setdefault(replica, gradient))


def _wrong_counts(rank: int, world_size: int) -> None:
    all_gather_rows(torch.zeros(2, 2), dist.group.WORLD, [1, 1])


def test_row_counts_must_fit() -> None:
    with pytest.raises(WorkerError, match=r"row_counts \[1, 1\] do not fit rank \d of 2 with 2 rows"):
        run_distributed(_wrong_counts, 2)
