"""A head's share of a microbatch by Triton kernels: what `SampledSoftmax` does, up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ove.heads import triton_backend
from megatron_ove.heads.margin_softmax import MarginSoftmax
from megatron_ove.heads.sampled_softmax import ActiveTable

MOST_LABELS = MOST_SETS = 16
"""What a kernel holds in registers for each sample."""
SAMPLE_PADDING = 16
"""Microbatches take a multiple of this many columns of the coefficients, so that every row of them is aligned."""


class FusedSoftmax:
    """One head's share of one microbatch on one rank: statistics, then gradients."""

    def __init__(self, table: ActiveTable, softmax: MarginSoftmax, embeddings: Tensor, targets: Tensor) -> None:
        """
        Args:
            table: the step's rows.
            softmax: scale and filter.
            embeddings: [b, e] fp32, normalized, replicated over the ranks that share the table.
            targets: [k, b] int64, position of each label among the active rows, -1 = on another rank or no label.
        """
        self.embeddings = embeddings
        self._table, self._softmax, self._targets = table, softmax, targets
        self._place = table.gradient.reserve(embeddings.shape[0])
        self._cosines = self._place
        if self._cosines is None:
            width = -(-embeddings.shape[0] // SAMPLE_PADDING) * SAMPLE_PADDING
            shape = (table.active.rows.numel(), width)
            self._cosines = torch.empty(shape, dtype=table.compute_dtype, device=embeddings.device)
        if table.directions is None:
            self._source = (table.weight, table.active.rows, table.norms)
        else:
            self._source = (table.directions, None, None)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Returns this rank's (sums of e^logit [s, b], cosines with labels [k, b], 0 for those elsewhere)."""
        return triton_backend.statistics(
            self.embeddings,
            *self._source,
            self._table.active.weights,
            self._targets,
            self._softmax,
            self._cosines,
            compute_dtype=self._table.compute_dtype,
        )

    def gradients(self, grad_sums: Tensor, grad_targets: Tensor) -> Tensor:
        """Adds to the gradient of the rows and returns this rank's part of that of the embeddings, [b, e] fp32."""
        gradient, cosines = self._table.gradient, self._cosines
        assert cosines is not None
        result = triton_backend.gradients(
            *self._source,
            self._table.active.weights,
            self._targets,
            self._softmax,
            cosines,
            grad_sums,
            grad_targets,
            gradient.radial,
            compute_dtype=self._table.compute_dtype,
        )
        if self._place is None:
            padded = torch.nn.functional.pad(self.embeddings, (0, 0, 0, cosines.shape[1] - self.embeddings.shape[0]))
            gradient.add(slice(0, cosines.shape[0]), cosines, padded, None)
        gradient.finish_microbatch(self.embeddings, self._place)
        return result
