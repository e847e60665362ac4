"""Collectives with gradients against their definition, on uneven and empty shares."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.parallel.collectives import all_gather_rows, sum_gradient_over_group
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


def _wrong_counts(rank: int, world_size: int) -> None:
    all_gather_rows(torch.zeros(2, 2), dist.group.WORLD, [1, 1])


def test_row_counts_must_fit() -> None:
    with pytest.raises(WorkerError, match=r"row_counts \[1, 1\] do not fit rank \d of 2 with 2 rows"):
        run_distributed(_wrong_counts, 2)
