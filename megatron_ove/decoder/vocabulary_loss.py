"""Cross entropy over a vocabulary that is split over tensor ranks, a few rows at a time.

The logits of all rows are never there: those of some rows are made, used and forgotten, and made again in the backward
pass. One exchange in the forward pass, one in the backward pass; the group is an argument; whether the likeliest token
is the right one comes for free.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 23
"""Logits that are there at a time: 32 MB of fp32."""


def vocabulary_loss(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (losses [A] fp32, whether the likeliest token is the target [A] bool).

    Args:
        rows: [A, h], equal on the ranks of `group`; their gradient is complete on each of them. A may be 0.
        weight: [v/tp, h], this rank's rows of the padded table.
        targets: [A] int64 in 0 .. vocab_size - 1.
        group: the ranks that share the table.
        vocab_size: rows of the whole table from here on are padding: never chosen, with gradient 0.
        chunk_rows: rows whose logits are there at a time; None = 32 MB of logits.
    """
    losses, is_right = _VocabularyLoss.apply(rows, weight, targets, group, vocab_size, chunk_rows)
    return losses, is_right


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, group: Any, vocab_size: int, chunk_rows: int | None
    ) -> tuple[Tensor, Tensor]:
        first = weight.shape[0] * group.rank()
        local = targets - first
        is_mine = (local >= 0) & (local < weight.shape[0])
        # of every row: largest logit, sum of exponentials above it, the target's logit, the likeliest token, for which
        # fp32 is exact up to 16 million
        parts = rows.new_empty(len(rows), 4, dtype=torch.float32)
        for chunk in _chunks(rows, weight, chunk_rows):
            logits = _logits(rows[chunk], weight, vocab_size - first)
            largest, best = logits.max(1)
            parts[chunk, 0], parts[chunk, 3] = largest, (best + first).float()
            own = logits.gather(1, local[chunk].clamp(0, weight.shape[0] - 1)[:, None])[:, 0]
            parts[chunk, 2] = own.masked_fill(~is_mine[chunk], 0.0)
            # A rank may hold padding only: its largest logit is -inf, and its sum must be 0 and not nan.
            parts[chunk, 1] = logits.sub_(parts[chunk, 0].nan_to_num(neginf=0.0)[:, None]).exp_().sum(1)
        largest, sums, target, best = _gather(parts, group).unbind(-1)  # [ranks, A] each
        top, winner = largest.max(0)
        log_sum = top + (sums * (largest - top).exp()).sum(0).log()
        target = target.sum(0)
        ctx.save_for_backward(rows, weight, local, is_mine, log_sum)
        ctx.group, ctx.columns, ctx.chunk_rows = group, vocab_size - first, chunk_rows
        is_right = best.gather(0, winner[None])[0] == targets
        ctx.mark_non_differentiable(is_right)
        return log_sum - target, is_right

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        rows, weight, local, is_mine, log_sum = ctx.saved_tensors
        wants_rows, wants_weight = ctx.needs_input_grad[:2]
        g_rows = torch.zeros_like(rows) if wants_rows else None
        g_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for chunk in _chunks(rows, weight, ctx.chunk_rows):
            scores = _logits(rows[chunk], weight, ctx.columns).sub_(log_sum[chunk, None]).exp_()
            mine = is_mine[chunk].to(scores.dtype)
            scores.scatter_add_(1, local[chunk].clamp(0, weight.shape[0] - 1)[:, None], -mine[:, None])
            scores = scores.mul_(gradient[chunk, None]).to(rows.dtype)
            if g_rows is not None:
                g_rows[chunk] = scores @ weight
            if g_weight is not None and rows.dtype == torch.float32:
                g_weight.addmm_(scores.t(), rows[chunk])
            elif g_weight is not None:
                g_weight += scores.t() @ rows[chunk]
        if g_rows is not None and ctx.group.size() > 1:
            dist.all_reduce(g_rows, group=ctx.group)
        return g_rows, None if g_weight is None else g_weight.to(weight.dtype), None, None, None, None


def _chunks(rows: Tensor, weight: Tensor, size: int | None) -> Iterator[slice]:
    size = size or max(1, _CHUNK_ELEMENTS // weight.shape[0])
    return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))


def _logits(rows: Tensor, weight: Tensor, columns: int) -> Tensor:
    """Returns [rows, v/tp] fp32 in a tensor of its own; -inf from column `columns` on."""
    logits = (rows @ weight.t()).float()
    logits[:, max(columns, 0) :] = -torch.inf
    return logits


def _gather(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns [ranks, A, parts] of all ranks."""
    if group.size() == 1:
        return parts[None]
    everyone = parts.new_empty(group.size() * len(parts), parts.shape[1])
    if len(parts):
        dist.all_gather_into_tensor(everyone, parts, group=group)
    return everyone.view(group.size(), *parts.shape)


def best_tokens(rows: Tensor, weight: Tensor, *, group: dist.ProcessGroup, vocab_size: int) -> Tensor:
    """Returns [A] int64, the likeliest token of every row, the same on all ranks of `group`; of equals the lowest.

    Args:
        rows, weight, group, vocab_size: as for `vocabulary_loss`.
    """
    first = weight.shape[0] * group.rank()
    value, index = _logits(rows, weight, vocab_size - first).max(1)
    if group.size() == 1:
        return index
    mine = torch.stack([value.double(), (index + first).double()], dim=1)
    everyone = mine.new_empty(group.size() * len(mine), 2)
    dist.all_gather_into_tensor(everyone, mine, group=group)
    values, tokens = everyone.view(group.size(), len(mine), 2).unbind(-1)
    return tokens.gather(0, values.argmax(0, keepdim=True))[0].long()
