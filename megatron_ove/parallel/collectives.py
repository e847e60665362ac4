"""Collectives with a gradient. The group is always an argument; a group of one rank costs nothing.

Each function says what its backward does, because that is where sharded code goes wrong. Rows = dim 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_rows(x: Tensor, group: dist.ProcessGroup, row_counts: Sequence[int]) -> Tensor:
    """Concatenates every rank's rows, in rank order.

    Backward: each rank receives the sum over ranks of the gradients of its own rows (a reduce-scatter), so the ranks'
    losses are taken to add up.

    Args:
        x: [n_rank, ...], sharded over `group` along dim 0; n_rank may differ and be 0.
        group: the ranks to gather over.
        row_counts: n of every rank, in rank order.

    Returns:
        [sum of n_rank, ...], replicated over `group`.
    """
    if group.size() == 1:
        return x
    counts = list(row_counts)
    if len(counts) != group.size() or counts[group.rank()] != x.shape[0]:
        raise ValueError(
            f"all_gather_rows: row_counts {counts} do not fit rank {group.rank()} of {group.size()} with "
            f"{x.shape[0]} rows"
        )
    return _AllGatherRows.apply(x, group, counts)


def gather_replica_rows(
    x: Tensor, data_group: dist.ProcessGroup, class_group: dist.ProcessGroup, row_counts: Sequence[int]
) -> Tensor:
    """Concatenates all replicas' rows, for a computation that is split over `class_group`.

    Backward: each rank of `class_group` has a part of the gradient of the result; each gets the sum of all parts for
    its own replica's rows, bit-equal on the tensor-parallel ranks of a replica. Without tensor parallelism that is a
    reduce-scatter; with it an all-reduce, since a reduce-scatter adds in another order for every receiver.

    Args:
        x: [n_replica, ...], equal on the tensor-parallel ranks of a replica; n_replica may differ and be 0.
        data_group: the replicas.
        class_group: tensor-parallel x data-parallel ranks, tensor-parallel ones next to each other.
        row_counts: n of every replica, in rank order.

    Returns:
        [sum of n_replica, ...], replicated over `class_group`.
    """
    if class_group.size() == data_group.size():
        return all_gather_rows(x, data_group, row_counts)
    return _GatherReplicaRows.apply(x, data_group, class_group, list(row_counts))


def sum_gradient_over_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns `x`. Backward: sums the gradient over ranks, right when a replicated `x` feeds each rank's own part."""
    return x if group.size() == 1 else _SumBackward.apply(x, group)


def _gather(x: Tensor, group: dist.ProcessGroup, counts: Sequence[int]) -> Tensor:
    """Uneven rows travel padded to the longest rank, since the collectives want equal shapes."""
    longest = max(counts)
    padded = _pad_rows(x, longest)
    gathered = torch.empty(longest * len(counts), *x.shape[1:], dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(gathered, padded, group=group)
    if min(counts) == longest:
        return gathered
    return torch.cat([block[:count] for block, count in zip(gathered.split(longest), counts, strict=True)])


def _scatter(x: Tensor, group: dist.ProcessGroup, counts: Sequence[int]) -> Tensor:
    longest = max(counts)
    padded = torch.cat([_pad_rows(block, longest) for block in x.split(list(counts))])
    kept = torch.empty(longest, *x.shape[1:], dtype=x.dtype, device=x.device)
    dist.reduce_scatter_tensor(kept, padded, group=group)
    return kept[: counts[group.rank()]]


def _pad_rows(x: Tensor, num_rows: int) -> Tensor:
    if x.shape[0] == num_rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(num_rows - x.shape[0], *x.shape[1:])])


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, counts: list[int]) -> Tensor:
        ctx.group, ctx.counts = group, counts
        return _gather(x, group, counts) if max(counts) else x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (_scatter(gradient, ctx.group, ctx.counts) if max(ctx.counts) else gradient), None, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _GatherReplicaRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, data_group: dist.ProcessGroup, class_group: dist.ProcessGroup, counts: list[int]
    ) -> Tensor:
        rank = data_group.rank()
        ctx.group, ctx.own = class_group, slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return _gather(x, data_group, counts) if max(counts) and len(counts) > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        if total.numel():
            dist.all_reduce(total, group=ctx.group)
        return total[ctx.own], None, None, None
