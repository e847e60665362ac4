"""Collectives with a gradient. The group is always an argument; a group of one rank costs nothing.

Each function says what its backward does, because that is where sharded code goes wrong. Rows = dim 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.parallel.row_blocks import GatheredRows, arrange_gathered_rows


def all_gather_rows(x: Tensor, group: dist.ProcessGroup, row_counts: np.ndarray) -> Tensor:
    """Concatenates every rank's rows: one block after the other, within a block one rank after the other.

    Backward: each rank receives the sum over ranks of the gradients of its own rows (a reduce-scatter), so the ranks'
    losses are taken to add up.

    Args:
        x: [n_rank, ...], sharded over `group` along dim 0, one block after the other; n_rank may differ and be 0.
        group: the ranks to gather over.
        row_counts: [blocks, ranks] int64, rows of every block on every rank.

    Returns:
        [sum of n_rank, ...], replicated over `group`.
    """
    if group.size() == 1:
        return x
    totals = row_counts.sum(axis=0)
    if len(totals) != group.size() or totals[group.rank()] != x.shape[0]:
        raise ValueError(
            f"all_gather_rows: row_counts {totals.tolist()} do not fit rank {group.rank()} of {group.size()} with "
            f"{x.shape[0]} rows"
        )
    if not totals.any():
        return x
    return _AllGatherRows.apply(x, group, arrange_gathered_rows(row_counts, group.rank(), x.device))


def gather_replica_rows(
    x: Tensor, data_group: dist.ProcessGroup, class_group: dist.ProcessGroup, row_counts: np.ndarray
) -> Tensor:
    """Concatenates all replicas' rows, for a computation that is split over `class_group`; ordered as above.

    Backward: each rank of `class_group` has a part of the gradient of the result; each gets the sum of all parts for
    its own replica's rows, bit-equal on the tensor-parallel ranks of a replica. Without tensor parallelism that is a
    reduce-scatter; with it an all-reduce, since a reduce-scatter adds in another order for every receiver.

    Args:
        x: [n_replica, ...], equal on the tensor-parallel ranks of a replica; n_replica may differ and be 0.
        data_group: the replicas.
        class_group: tensor-parallel x data-parallel ranks, tensor-parallel ones next to each other.
        row_counts: [blocks, replicas] int64, rows of every block on every replica.

    Returns:
        [sum of n_replica, ...], replicated over `class_group`.
    """
    if class_group.size() == data_group.size():
        return all_gather_rows(x, data_group, row_counts)
    if not row_counts.any():
        return x
    rows = arrange_gathered_rows(row_counts, data_group.rank(), x.device)
    return _GatherReplicaRows.apply(x, data_group, class_group, rows)


def sum_gradient_over_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns `x`. Backward: sums the gradient over ranks, right when a replicated `x` feeds each rank's own part."""
    return x if group.size() == 1 else _SumBackward.apply(x, group)


def _gather(x: Tensor, group: dist.ProcessGroup, rows: GatheredRows) -> Tensor:
    sent = x.contiguous()
    if len(x) < rows.longest:
        sent = torch.cat([x, x.new_zeros(rows.longest - len(x), *x.shape[1:])])
    gathered = x.new_empty(rows.longest * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, sent, group=group)
    return gathered if rows.places is None else gathered.index_select(0, rows.places)


def _scatter(x: Tensor, group: dist.ProcessGroup, rows: GatheredRows) -> Tensor:
    padded = x.contiguous()
    if rows.places is not None:
        padded = x.new_zeros(rows.longest * group.size(), *x.shape[1:]).index_copy_(0, rows.places, x)
    kept = x.new_empty(rows.longest, *x.shape[1:])
    dist.reduce_scatter_tensor(kept, padded, group=group)
    return kept[: rows.own.numel()]


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, rows: GatheredRows) -> Tensor:
        ctx.group, ctx.rows = group, rows
        return _gather(x, group, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(gradient, ctx.group, ctx.rows), None, None


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
        ctx: Any, x: Tensor, data_group: dist.ProcessGroup, class_group: dist.ProcessGroup, rows: GatheredRows
    ) -> Tensor:
        ctx.group, ctx.own = class_group, rows.own
        return _gather(x, data_group, rows) if data_group.size() > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total if len(total) == len(ctx.own) else total.index_select(0, ctx.own), None, None, None
