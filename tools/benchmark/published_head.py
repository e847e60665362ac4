"""The published cluster-discrimination head, written plainly from its description: what ours is compared with.

Every label slot draws its own tenth of the classes, its positives among them; copies those rows, normalizes the copies,
multiplies, applies margin and filter, and takes a softmax. The 8 row copies, their normalized forms and the 8 matrices
of probabilities live until the backward pass. Autograd makes one dense gradient of the whole table; its norm is clipped
on each rank by itself, and torch.optim.AdamW passes over every row. Ranks hold contiguous ranges of classes and gather
all embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

INITIAL_STD = 0.01
SMALLEST_PROBABILITY = 1e-30


class PublishedHead:
    """One rank's part of the table, its optimizer, and the loss.

    Attributes:
        weight: [c_local, e] fp32 parameter, classes `first_class .. first_class + c_local - 1`.
        drawn_rows: rows of each slot's set in the last microbatch, local numbers, ascending.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        num_slots: int,
        sample_rate: float,
        lr: float,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        fused_adamw: bool = False,
        margin: float = 0.3,
        logit_scale: float = 64.0,
        interclass_filter: float = 0.75,
        clip_grad_norm: float = 5.0,
        weight_decay: float = 0.05,
    ) -> None:
        """Makes the table.

        Args:
            num_classes: of all ranks together.
            embedding_size: e.
            num_slots: labels of a sample that are used in a step; each is a softmax of its own.
            sample_rate: share of a rank's rows in each slot's set.
            lr: learning rate.
            group: ranks that share the classes; None = this process has them all.
            device: of the table; on CUDA the products are in bfloat16, on the CPU in float32.
            fused_adamw: AdamW in one pass over memory (an option of PyTorch that the publication does not use).
            margin: CosFace, subtracted from the target's cosine.
            logit_scale: between cosine and logit.
            interclass_filter: logits of negatives with a larger cosine become 0.
            clip_grad_norm: of this rank's gradient.
            weight_decay: of AdamW.
        """
        self._group = group if group is not None and group.size() > 1 else None
        size, rank = (self._group.size(), self._group.rank()) if self._group else (1, 0)
        self.first_class = num_classes // size * rank + min(rank, num_classes % size)
        self.num_local = num_classes // size + int(rank < num_classes % size)
        self._num_slots, self._num_sampled = num_slots, max(1, int(sample_rate * self.num_local))
        self._margin, self._scale, self._filter, self._clip = margin, logit_scale, interclass_filter, clip_grad_norm
        self._dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        table = torch.empty(self.num_local, embedding_size, device=device).normal_(0, INITIAL_STD)
        self.weight = torch.nn.Parameter(table)
        self._optimizer = torch.optim.AdamW(
            [self.weight], lr=lr, weight_decay=weight_decay, fused=True if fused_adamw else None
        )
        self.drawn_rows: list[Tensor] = []

    def loss(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of a microbatch: the mean over samples and slots, as published.

        Its backward pass follows the *sum* over slots, also as published.

        Args:
            pooled: [b, e] embeddings of this rank's samples, not normalized; equally many on every rank.
            labels: [b, k] class ids, one column per slot.
        """
        labels = _gather(labels, self._group)
        embeddings = normalize(_GatherRows.apply(pooled.float(), self._group), dim=1).to(self._dtype)
        self.drawn_rows, logits, targets = [], [], []
        for slot in labels.unbind(1):
            local = slot - self.first_class
            local = torch.where((local >= 0) & (local < self.num_local), local, -1)
            rows = self._draw_rows(local)
            target = torch.where(local >= 0, torch.searchsorted(rows, local.clamp(min=0)), -1)
            # index_select rather than indexing: on a CPU its backward pass is the faster of the two.
            directions = normalize(self.weight.index_select(0, rows), dim=1).to(self._dtype)
            logits.append(self._logits(embeddings @ directions.T, target))
            targets.append(target)
            self.drawn_rows.append(rows)
        loss: Tensor = _SoftmaxOfSlots.apply(torch.stack(targets), self._group, *logits)
        return loss

    def update(self) -> None:
        """Clips this rank's gradient and steps AdamW over the whole table."""
        torch.nn.utils.clip_grad_norm_([self.weight], self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _draw_rows(self, local: Tensor) -> Tensor:
        positives = local[local >= 0].unique()
        if len(positives) >= self._num_sampled:
            return positives
        priority = torch.rand(self.num_local, device=local.device)
        priority[positives] = 2.0
        return priority.topk(self._num_sampled, sorted=False).indices.sort().values

    def _logits(self, cosine: Tensor, target: Tensor) -> Tensor:
        """Returns [b, n] fp32; `target` [b] is the column of each sample's class, -1 = on another rank."""
        cosine = cosine.float().clamp(-1, 1)
        sample = (target >= 0).nonzero().flatten()
        column = target[sample]
        keep = cosine.detach() <= self._filter
        keep[sample, column] = True
        logits = cosine * keep
        logits[sample, column] -= self._margin
        return logits * self._scale


class _SoftmaxOfSlots(torch.autograd.Function):
    """Softmax cross-entropy of every slot over the classes of all ranks; logits are overwritten by probabilities."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, group: dist.ProcessGroup | None, *logits: Tensor) -> Tensor:
        largest = torch.cat([part.amax(1) for part in logits])
        _all_reduce(largest, dist.ReduceOp.MAX, group)
        for part, peak in zip(logits, largest.chunk(len(logits)), strict=True):
            part.sub_(peak[:, None]).exp_()
        sums = torch.cat([part.sum(1) for part in logits])
        _all_reduce(sums, dist.ReduceOp.SUM, group)
        for part, total in zip(logits, sums.chunk(len(logits)), strict=True):
            part.div_(total[:, None])
        is_here = targets >= 0
        columns = targets.clamp(min=0)[..., None]
        probability = torch.stack([part.gather(1, column)[:, 0] for part, column in zip(logits, columns, strict=True)])
        probability = torch.where(is_here, probability, 0.0)
        _all_reduce(probability, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(is_here, columns, *logits)
        return -probability.clamp(min=SMALLEST_PROBABILITY).log().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        is_here, columns, *probabilities = ctx.saved_tensors
        factor = gradient / is_here.shape[1]  # by the samples, not by the slots
        for part, here, column in zip(probabilities, is_here, columns, strict=True):
            part.scatter_add_(1, column, -here[:, None].to(part.dtype)).mul_(factor)
        return None, None, *probabilities


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks; backward: one reduce per rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _gather(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        if group is None:
            return gradient, None
        parts = [part.contiguous() for part in gradient.chunk(group.size())]
        for rank, part in enumerate(parts):
            dist.reduce(part, dist.get_global_rank(group, rank), group=group)
        return parts[group.rank()], None


def _gather(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return rows
    parts = [torch.empty_like(rows) for _ in range(group.size())]
    dist.all_gather(parts, rows.contiguous(), group=group)
    return torch.cat(parts)


def _all_reduce(values: Tensor, operation: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(values, operation, group=group)
