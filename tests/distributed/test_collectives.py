"""Collectives with gradients against their definition, on uneven and empty shares."""

from __future__ import annotations

import numpy as np
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
    gathered = all_gather_rows(x, dist.group.WORLD, np.array([counts]))
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


BLOCKS = [[[2, 1], [1, 2]], [[3, 0, 1], [0, 0, 2], [1, 4, 0]], [[2, 2], [2, 2]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]]


def _blocks_worker(rank: int, world_size: int, counts: list[list[int]]) -> tuple[Tensor, Tensor]:
    x = _rows(rank, sum(block[rank] for block in counts))
    gathered = all_gather_rows(x, dist.group.WORLD, np.array(counts))
    weight = torch.arange(gathered.numel()).view_as(gathered).float() + rank
    (gathered * weight).sum().backward()
    return gathered.detach(), x.grad


@pytest.mark.parametrize("counts", BLOCKS)
def test_blocks_of_all_ranks_come_one_after_the_other(counts: list[list[int]]) -> None:
    world_size = len(counts[0])
    results = run_distributed(_blocks_worker, world_size, counts)
    own = [[block[rank] for block in counts] for rank in range(world_size)]
    parts = [_rows(rank, sum(own[rank])).detach().split(own[rank]) for rank in range(world_size)]
    expected = torch.cat([parts[rank][block] for block in range(len(counts)) for rank in range(world_size)])
    total = torch.arange(expected.numel()).view_as(expected).float() * world_size + sum(range(world_size))
    pieces = iter(total.split([count for block in counts for count in block]))
    by_block = [[next(pieces) for _ in block] for block in counts]
    for rank, (gathered, gradient) in enumerate(results):
        assert torch.equal(gathered, expected)
        assert torch.equal(gradient, torch.cat([block[rank] for block in by_block]))


def _sum_worker(rank: int, world_size: int) -> Tensor:
    y = torch.ones(2, requires_grad=True)
    (sum_gradient_over_group(y, dist.group.WORLD) * (rank + 1)).sum().backward()
    return y.grad


def test_sum_of_gradients() -> None:
    for gradient in run_distributed(_sum_worker, 3):
        assert torch.equal(gradient, torch.full((2,), 6.0))


def _replica_worker(
    rank: int, world_size: int, tensor_size: int, all_counts: list[list[list[int]]]
) -> list[tuple[int, Tensor, Tensor]]:
    topology = initialize_topology(ParallelConfig(tensor_model_parallel_size=tensor_size), seed=0)
    results = []
    for counts in all_counts:
        x = _rows(topology.data_rank, sum(block[topology.data_rank] for block in counts))
        gathered = gather_replica_rows(x, topology.data_group, topology.class_group, np.array(counts))
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
    layouts = ([[2, 2]], [[0, 3]], [[1, 0]], [[0, 0]], [[2, 1], [0, 3], [1, 1]], [[1, 1], [1, 1]])
    all_counts = [[block[:num_replicas] for block in blocks] for blocks in layouts]
    ranks = run_distributed(_replica_worker, world_size, tensor_size, all_counts)
    for index, counts in enumerate(all_counts):
        own = [[block[replica] for block in counts] for replica in range(num_replicas)]
        parts = [_rows(replica, sum(own[replica])).detach().split(own[replica]) for replica in range(num_replicas)]
        expected = torch.cat([parts[replica][block] for block in range(len(counts)) for replica in range(num_replicas)])
        shape = expected.shape
        total = sum(torch.randn(shape, generator=torch.Generator().manual_seed(rank)) for rank in range(world_size))
        pieces = iter(total.split([count for block in counts for count in block]))
        by_block = [[next(pieces) for _ in block] for block in counts]
        seen: dict[int, Tensor] = {}
        for results in ranks:
            replica, gathered, gradient = results[index]
            assert torch.equal(gathered, expected)
            torch.testing.assert_close(gradient, torch.cat([block[replica] for block in by_block]))
            # Weights of the encoder follow from it on every tensor-parallel rank, so not a bit may differ.
            assert torch.equal(gradient, seen.setdefault(replica, gradient))


def _wrong_counts(rank: int, world_size: int) -> None:
    all_gather_rows(torch.zeros(2, 2), dist.group.WORLD, np.array([[1, 1]]))


def test_row_counts_must_fit() -> None:
    with pytest.raises(WorkerError, match=r"row_counts \[1, 1\] do not fit rank \d of 2 with 2 rows"):
        run_distributed(_wrong_counts, 2)
