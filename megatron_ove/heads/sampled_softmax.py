"""Sums of e^logit over the active classes of all ranks, in chunks, with both gradients; the large part of a head.

Cosines are bounded, so e^logit needs no maximum subtracted and sums of ranks simply add. One exponential serves all
class sets: their sums are one small GEMM with the sets' weights. A sample's own labels are left out; they are few, and
`MarginSoftmax.sample_losses` puts them back with their margins. Rows are read from the table where they lie; only a
chunk of them is ever copied, small enough to stay in cache until the GEMM has used it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.heads.active_classes import ActiveRows
from megatron_ove.heads.margin_softmax import MarginSoftmax
from megatron_ove.heads.row_gradient import RowGradient


@dataclass(frozen=True)
class ActiveTable:
    """The part of a table that a step sees.

    Attributes:
        weight: [c_local + 1, e] fp32 or bf16, all rows of the shard and a spare one that padding points at.
        norms: [c_local + 1] fp32, Euclidean norm of each row, never 0.
        active: which rows take part, and in which class sets.
        gradient: what backward passes add to.
        directions: [a, e] bf16, a normalized copy of the active rows; None = they are read where they are stored.
        compute_dtype: of the operands of GEMMs.
        chunk_size: rows per chunk.
        is_fused: whether Triton kernels do the work.
    """

    weight: Tensor
    norms: Tensor
    active: ActiveRows
    gradient: RowGradient
    directions: Tensor | None
    compute_dtype: torch.dtype
    chunk_size: int
    is_fused: bool = False

    def stored_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (active rows, a copy of their weights [r, e] as stored, which the next chunk overwrites)."""
        return chunks_of(self.weight, self.active.rows, self.chunk_size)

    def operand_chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yields (active rows; operand [r, e] of GEMMs, not to be written to; 1 / norm [r, 1], None if normalized)."""
        rows = self.active.rows
        if self.directions is None:
            for chunk, weight in self.stored_chunks():
                yield chunk, weight.to(self.compute_dtype), self.norms[rows[chunk]].reciprocal_()[:, None]
        else:
            for start in range(0, rows.numel(), self.chunk_size):
                chunk = slice(start, min(start + self.chunk_size, rows.numel()))
                yield chunk, self.directions[chunk], None


def chunks_of(table: Tensor, rows: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields (positions in `rows`, these rows of the table); always in the same memory, which may be written to."""
    buffer = table.new_empty(min(chunk_size, rows.numel()), *table.shape[1:])
    for start in range(0, rows.numel(), chunk_size):
        part = rows[start : start + chunk_size]
        yield slice(start, start + part.numel()), torch.index_select(table, 0, part, out=buffer[: part.numel()])


class HeadShare(Protocol):
    """One head's share of one microbatch on one rank: statistics, then gradients."""

    embeddings: Tensor

    def statistics(self) -> tuple[Tensor, Tensor]: ...

    def gradients(self, grad_sums: Tensor, grad_targets: Tensor) -> Tensor: ...


@dataclass
class SampledSoftmax:
    """A head's share in plain torch.

    Attributes:
        embeddings: [b, e] fp32, normalized, replicated over the ranks that share the table.
        targets: [k, b] int64, position of each label among the active rows, -1 = on another rank or no label.
    """

    table: ActiveTable
    softmax: MarginSoftmax
    embeddings: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        self._operand = self.embeddings.to(self.table.compute_dtype)
        self._cosines = self.table.gradient.reserve(self.embeddings.shape[0])

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Returns this rank's (sums of e^logit [s, b], cosines with labels [k, b], 0 for those elsewhere)."""
        num_samples, num_sets = self.embeddings.shape[0], self.table.active.weights.shape[1]
        dtype = self.softmax.sum_dtype
        sums = self.embeddings.new_zeros(num_sets, num_samples, dtype=dtype)
        target_cosine = self.embeddings.new_zeros(self.targets.shape, dtype=dtype)
        if num_samples and self.table.active.rows.numel():
            self._measure_targets(target_cosine)
        for chunk, weight, inverse_norm in self.table.operand_chunks() if num_samples else ():
            cosines = self._measure_cosines(chunk, weight, inverse_norm)
            place, _ = self._targets_in(chunk)
            exponentials = self._exponentials(cosines, place)[:-1]
            sums.addmm_(self.table.active.weights[chunk].T.to(dtype), exponentials)
        return sums, target_cosine

    def gradients(self, grad_sums: Tensor, grad_targets: Tensor) -> Tensor:
        """Adds to the gradient of the rows.

        Args:
            grad_sums: [s, b], of the sums over all ranks.
            grad_targets: [k, b], of the complete cosines with labels.

        Returns:
            This rank's part of the gradient of the embeddings, [b, e] fp32.
        """
        result = torch.zeros_like(self.embeddings)
        gradient, known = self.table.gradient, self._cosines
        grad_logits, grad_targets = grad_sums * self.softmax.logit_scale, grad_targets.float()
        for chunk, weight, inverse_norm in self.table.operand_chunks() if len(result) else ():
            cosines = self._measure_cosines(chunk, weight, inverse_norm) if known is None else known[chunk]
            place, is_here = self._targets_in(chunk)
            coefficients = self._exponentials(cosines, place, is_gradient=True)
            coefficients[:-1] *= self.table.active.weights[chunk].to(grad_logits.dtype) @ grad_logits
            coefficients = coefficients.float().scatter_add_(0, place, grad_targets.where(is_here, 0.0))[:-1]
            gradient.radial[chunk] += torch.linalg.vecdot(coefficients, cosines)
            if known is not None:
                known[chunk] = coefficients
            gradient.add(chunk, coefficients, self.embeddings, known)
            if inverse_norm is not None:
                coefficients *= inverse_norm
            _add_product(result, coefficients.T, weight)
        gradient.finish_microbatch(self.embeddings, known)
        return result

    def _measure_targets(self, cosines: Tensor) -> None:
        """Writes the cosines with labels' centers, [k, b], in fp32 whatever the compute dtype: a loss hangs on each."""
        for targets, out in zip(self.targets, cosines, strict=True):
            rows = self.table.active.rows[targets.clamp(min=0)]
            cosine = torch.linalg.vecdot(self.table.weight[rows].float(), self.embeddings) / self.table.norms[rows]
            out.copy_(cosine.where(targets >= 0, 0.0))

    def _measure_cosines(self, chunk: slice, weight: Tensor, inverse_norm: Tensor | None) -> Tensor:
        """Returns [r, b] fp32 cosines, kept for the backward pass where there is a place for them."""
        place = None if self._cosines is None else self._cosines[chunk]
        if weight.dtype == torch.float32:
            cosines = torch.mm(weight, self._operand.T, out=place)
        else:
            product = weight @ self._operand.T
            cosines = product.float() if place is None else place.copy_(product)
        return cosines if inverse_norm is None else cosines.mul_(inverse_norm)

    def _targets_in(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Returns ([k, b] row of each label within the chunk, or the row beyond for the others; whether it is there).

        The row beyond takes what belongs elsewhere, so that no shape depends on the data and no GPU is waited for.
        """
        is_here = (self.targets >= chunk.start) & (self.targets < chunk.stop)
        return torch.where(is_here, self.targets - chunk.start, chunk.stop - chunk.start), is_here

    def _exponentials(self, cosines: Tensor, place: Tensor, *, is_gradient: bool = False) -> Tensor:
        """Returns e^logit of negatives, [r + 1, b], the last row of no meaning; 0 for own labels.

        For gradients also 0 where the filter made it a constant.
        """
        exponentials = cosines.new_empty(len(cosines) + 1, cosines.shape[1], dtype=self.softmax.sum_dtype)
        inner = torch.mul(cosines, self.softmax.logit_scale, out=exponentials[:-1]).exp_()
        # A CPU need not be waited for, and there is rarely anything to filter.
        if cosines.is_cuda or not bool(cosines.max() <= self.softmax.interclass_filter):
            suspicious = self.softmax.suspicious(cosines)
        else:
            suspicious = None
        if suspicious is not None:
            inner.masked_fill_(suspicious, 0.0 if is_gradient else self.softmax.filtered_exponential)
        return exponentials.scatter_(0, place, 0.0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, the operands taken in the type of `right`."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += (left.contiguous().to(right.dtype) @ right).float()


def exchange_statistics(parts: Sequence[HeadShare], group: dist.ProcessGroup) -> list[tuple[Tensor, Tensor]]:
    """Returns each head's statistics over the classes of all ranks; one collective for all heads, none in backward.

    Every rank of `group` must go on alike from the results (they are identical); the backward pass then adds this
    rank's part to each table's row gradient and returns this rank's part of the gradient of the embeddings, to be
    summed over `group` by the caller.

    Args:
        parts: heads of one microbatch, in the same order on every rank.
        group: ranks over which their tables are sharded.

    Returns:
        Per head: log-sum-exp of each class set without the sample's own labels, [s, b], -inf when nothing is left; and
        the cosine with each label's center, [k, b], 0 for no label.
    """
    # The row gradient must also be formed when no gradient is wanted for the embeddings.
    device = parts[0].embeddings.device
    anchor = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
    flat = _Statistics.apply(anchor, group, parts, *(part.embeddings for part in parts))
    return [(_log(sums).float(), cosines.float()) for sums, cosines in zip(flat[::2], flat[1::2], strict=True)]


def _log(sums: Tensor) -> Tensor:
    """Logarithm with -inf and no gradient at 0."""
    is_empty = sums == 0
    return sums.masked_fill(is_empty, 1.0).log().masked_fill(is_empty, -torch.inf)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, group: dist.ProcessGroup, parts: Sequence[HeadShare], *embeddings: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.parts = parts
        local = [tensor for part in parts for tensor in part.statistics()]
        if group.size() == 1:
            return tuple(local)
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in local) else torch.float32
        total = torch.cat([tensor.flatten().to(dtype) for tensor in local])
        if total.numel():
            dist.all_reduce(total, group=group)
        pieces = total.split([tensor.numel() for tensor in local])
        return tuple(piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, local, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(gradients[::2], gradients[1::2], strict=True)
        return None, None, None, *(part.gradients(*pair) for part, pair in zip(ctx.parts, pairs, strict=True))
