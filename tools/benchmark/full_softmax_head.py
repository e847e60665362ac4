"""The softmax over every class, chunked: the yardstick that draws no negatives.

Nothing larger than a chunk of logits is ever held; the backward pass computes each chunk again. All label slots share
the sum over the classes that are no label of the sample; the rest is a matter of a few numbers per sample. The gradient
is dense and torch.optim.AdamW passes over every row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

INITIAL_STD = 0.01


class FullSoftmaxHead:
    """The table, its optimizer, and the loss; one process.

    Attributes:
        weight: [c, e] fp32 parameter.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        lr: float,
        device: torch.device | str = "cpu",
        chunk_size: int = 4096,
        margin: float = 0.3,
        logit_scale: float = 64.0,
        interclass_filter: float = 0.75,
        clip_grad_norm: float = 5.0,
        weight_decay: float = 0.05,
    ) -> None:
        """Makes the table.

        Args:
            num_classes: c.
            embedding_size: e.
            lr: learning rate.
            device: of the table; on CUDA the products are in bfloat16, on the CPU in float32.
            chunk_size: classes whose logits are held at a time.
            margin: CosFace, subtracted from the target's cosine.
            logit_scale: between cosine and logit.
            interclass_filter: logits of negatives with a larger cosine become 0.
            clip_grad_norm: of the gradient of the table.
            weight_decay: of AdamW.
        """
        self.weight = torch.nn.Parameter(
            torch.empty(num_classes, embedding_size, device=device).normal_(0, INITIAL_STD)
        )
        self._margin, self._scale, self._filter, self._clip = margin, logit_scale, interclass_filter, clip_grad_norm
        self._chunk_size = chunk_size
        self._optimizer = torch.optim.AdamW([self.weight], lr=lr, weight_decay=weight_decay)

    def loss(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean over samples and slots of the margin softmax over all classes.

        Args:
            pooled: [b, e] embeddings, not normalized.
            labels: [b, k] class ids; every slot is filled.
        """
        embeddings = normalize(pooled.float(), dim=1)
        log_sum, cosine = _SoftmaxParts.apply(
            embeddings, self.weight, labels, self._scale, self._filter, self._chunk_size
        )
        own = self._scale * (cosine - self._margin)  # [b, k]
        is_same = labels[:, :, None] == labels[:, None, :]
        is_repeated = is_same.tril(-1).any(2)  # a class that is stored twice is one class
        others = self._scale * torch.where(cosine > self._filter, 0.0, cosine)
        others = others[:, None, :].expand(is_same.shape).masked_fill(is_same | is_repeated[:, None, :], -torch.inf)
        everything = torch.cat([log_sum[:, None, None].expand(*own.shape, 1), own[..., None], others], dim=2)
        return (everything.logsumexp(2) - own).mean()

    def update(self) -> None:
        """Clips the gradient and steps AdamW over the whole table."""
        torch.nn.utils.clip_grad_norm_([self.weight], self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()


class _SoftmaxParts(torch.autograd.Function):
    """Log of the sum over classes that are no label of the sample [b], and the labels' cosines [b, k]."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: float,
        interclass_filter: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        log_sum = embeddings.new_full((len(embeddings),), -torch.inf)
        targets = embeddings.new_empty(labels.shape)
        for start in range(0, len(weight), chunk_size):
            _, cosine = _cosines(embeddings, weight[start : start + chunk_size])
            sample, slot, column = _labels_within(labels, start, cosine.shape[1])
            targets[sample, slot] = cosine[sample, column]
            logits = torch.where(cosine > interclass_filter, 0.0, cosine).mul_(scale)
            logits[sample, column] = -torch.inf
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
        ctx.save_for_backward(embeddings, weight, labels, log_sum)
        ctx.options = scale, interclass_filter, chunk_size
        return log_sum, targets

    @staticmethod
    def backward(ctx: Any, g_log_sum: Tensor, g_targets: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, weight, labels, log_sum = ctx.saved_tensors
        scale, interclass_filter, chunk_size = ctx.options
        g_embeddings, g_weight = torch.zeros_like(embeddings), torch.empty_like(weight)
        for start in range(0, len(weight), chunk_size):
            rows = weight[start : start + chunk_size]
            directions, cosine = _cosines(embeddings, rows)
            sample, slot, column = _labels_within(labels, start, cosine.shape[1])
            g_cosine = (scale * cosine - log_sum[:, None]).exp_().mul_(scale * g_log_sum[:, None])
            g_cosine = torch.where(cosine > interclass_filter, 0.0, g_cosine)
            g_cosine[sample, column] = 0.0
            g_cosine.index_put_((sample, column), g_targets[sample, slot], accumulate=True)
            g_cosine = g_cosine.to(directions.dtype)
            g_embeddings += g_cosine @ directions
            g_directions = (g_cosine.T @ embeddings.to(directions.dtype)).float()
            radial = (g_directions * directions).sum(1, keepdim=True)
            g_rows = g_weight[start : start + chunk_size]
            torch.addcmul(g_directions, radial, directions.float(), value=-1, out=g_rows)
            g_rows.div_(rows.norm(dim=1, keepdim=True))
        return g_embeddings, g_weight, None, None, None, None


def _cosines(embeddings: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows' directions [r, e] and cosines [b, r] fp32."""
    directions = normalize(rows, dim=1)
    if rows.is_cuda:
        directions = directions.bfloat16()
    return directions, (embeddings.to(directions.dtype) @ directions.T).float()


def _labels_within(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (sample, slot, column) of the labels among classes `start .. start + count - 1`."""
    column = labels - start
    sample, slot = ((column >= 0) & (column < count)).nonzero(as_tuple=True)
    return sample, slot, column[sample, slot]
