"""Log-sum-exp over the active classes of all ranks, in chunks, with both gradients; the large part of the head.

The forward pass keeps no logits: the backward pass computes them again, chunk by chunk. A sample's own labels are left
out of the log-sum-exp; they are few, and `MarginSoftmax.sample_losses` puts them back with their margins. So one GEMM
per chunk serves all label slots, and each slot only reads the rows of its own class set from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.heads.active_classes import ActiveRows
from megatron_ove.heads.margin_softmax import MarginSoftmax


def sampled_log_sum_exp(
    embeddings: Tensor,
    directions: Tensor,
    row_gradient: Tensor,
    targets: Tensor,
    *,
    active: ActiveRows,
    softmax: MarginSoftmax,
    class_group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Returns what a margin softmax over sampled classes needs to know about them.

    One collective in the forward pass, none in the backward pass. Every rank of `class_group` must go on alike from the
    results (they are identical); the backward pass then adds this rank's part to `row_gradient` and returns this
    rank's part of the gradient of the embeddings, to be summed over `class_group` by the caller.

    Args:
        embeddings: [b, e] fp32, normalized, replicated over `class_group`.
        directions: [a, e] fp32, this rank's active rows, normalized.
        row_gradient: [a, e] fp32, accumulator of the gradient of `directions`; written by the backward pass.
        targets: [b, k] int64, position in `directions` of each label's row; -1 when it is on another rank or invalid.
        active: this rank's rows and class sets.
        softmax: scale and filter.
        class_group: ranks over which the classes are sharded.

    Returns:
        negatives: [b, s], log-sum-exp over each of the s class sets without the sample's own labels; -inf when nothing
            is left.
        target_cosine: [b, k], cosine with each label's center, 0 for invalid labels.
    """
    # The row gradient must also be formed when no gradient is wanted for the embeddings.
    anchor = torch.zeros((), device=embeddings.device, requires_grad=torch.is_grad_enabled())
    return _SampledLogSumExp.apply(embeddings, anchor, directions, row_gradient, targets, active, softmax, class_group)


class _SampledLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        anchor: Tensor,
        directions: Tensor,
        row_gradient: Tensor,
        targets: Tensor,
        active: ActiveRows,
        softmax: MarginSoftmax,
        class_group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        num_sets = len(active.members)
        local = embeddings.new_zeros(num_sets + targets.shape[1], embeddings.shape[0])
        negatives, target_cosine = local[:num_sets].fill_(-math.inf), local[num_sets:]
        for chunk in _chunks(embeddings, directions, targets, active, softmax):
            target_cosine += chunk.cosines.gather(0, chunk.targets).masked_fill_(~chunk.has_target, 0.0)
            logits = chunk.logits()
            for index, members in chunk.members():
                selected = logits.index_select(0, members)
                negatives[index] = torch.logaddexp(negatives[index], selected.logsumexp(0))
        merged, total = _merge(local, num_sets, class_group)
        ctx.save_for_backward(embeddings, directions, targets, merged)
        ctx.row_gradient, ctx.active, ctx.softmax = row_gradient, active, softmax
        return merged.T, total.T

    @staticmethod
    def backward(ctx: Any, grad_negatives: Tensor, grad_target: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, directions, targets, negatives = ctx.saved_tensors
        grad_embeddings = torch.zeros_like(embeddings)
        grad_negatives, grad_target = grad_negatives.T, grad_target.T  # [s, b], [k, b]
        reference = negatives.masked_fill(negatives == -math.inf, 0.0)
        for chunk in _chunks(embeddings, directions, targets, ctx.active, ctx.softmax):
            logits = chunk.logits()
            gradient = torch.zeros_like(chunk.cosines)  # of the cosines; [r + 1, b]
            for index, members in chunk.members():
                share = logits.index_select(0, members).sub_(reference[index]).exp_().mul_(grad_negatives[index])
                gradient.index_add_(0, members, share)
            gradient *= ctx.softmax.logit_scale
            suspicious = ctx.softmax.suspicious(chunk.cosines)
            if suspicious is not None:
                gradient.masked_fill_(suspicious, 0.0)
            gradient.scatter_add_(0, chunk.targets, grad_target.masked_fill(~chunk.has_target, 0.0))
            gradient = gradient[:-1]
            ctx.row_gradient[chunk.start : chunk.stop].addmm_(gradient, embeddings)
            grad_embeddings.addmm_(gradient.T, directions[chunk.start : chunk.stop])
        return grad_embeddings, None, None, None, None, None, None, None


class _Chunk:
    """Cosines of one block of active rows, rows first: [r + 1, b].

    The last row is a spare: scatters of targets that lie in other chunks or on other ranks end there, so that none of
    this depends on the data and a GPU is never waited for.
    """

    def __init__(
        self,
        index: int,
        embeddings: Tensor,
        directions: Tensor,
        targets: Tensor,
        active: ActiveRows,
        softmax: MarginSoftmax,
    ) -> None:
        self.start = index * active.chunk_size
        self.stop = min(self.start + active.chunk_size, directions.shape[0])
        self._index, self._active, self._softmax = index, active, softmax
        num_rows = self.stop - self.start
        self.cosines = embeddings.new_zeros(num_rows + 1, embeddings.shape[0])
        torch.mm(directions[self.start : self.stop], embeddings.T, out=self.cosines[:num_rows])
        targets = targets.T  # [k, b]
        self.has_target = (targets >= self.start) & (targets < self.stop)
        self.targets = torch.where(self.has_target, targets - self.start, num_rows)

    def logits(self) -> Tensor:
        """Filtered logits; -inf at the samples' own labels."""
        return self._softmax.negative_logits(self.cosines).scatter_(0, self.targets, -math.inf)

    def members(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (class set, rows of this chunk that belong to it) for every set that has some."""
        for number, (members, splits) in enumerate(zip(self._active.members, self._active.member_splits, strict=True)):
            begin, end = splits[self._index], splits[self._index + 1]
            if begin < end:
                yield number, members[begin:end] - self.start


def _chunks(
    embeddings: Tensor, directions: Tensor, targets: Tensor, active: ActiveRows, softmax: MarginSoftmax
) -> Iterator[_Chunk]:
    if embeddings.shape[0]:
        for index in range(-(-directions.shape[0] // active.chunk_size)):
            yield _Chunk(index, embeddings, directions, targets, active, softmax)


def _merge(local: Tensor, num_sets: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Merges [s + k, b] statistics of all ranks in one collective: log-sum-exps, and cosines that one rank knows."""
    if group.size() == 1 or local.numel() == 0:
        return local[:num_sets].contiguous(), local[num_sets:].contiguous()
    gathered = local.new_empty(group.size() * local.shape[0], local.shape[1])
    dist.all_gather_into_tensor(gathered, local, group=group)
    gathered = gathered.view(group.size(), *local.shape)
    return gathered[:, :num_sets].logsumexp(0), gathered[:, num_sets:].sum(0)
