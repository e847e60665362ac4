"""Storage of one rank's class centers and their AdamW, in chunks of rows that stay in cache.

What is stored is what the options ask for: weights fp32, or bf16 with stochastic rounding; first moments fp32, bf16 or
none; second moments by element or one per row. The arithmetic is fp32 always.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.heads import triton_backend
from megatron_ove.heads.sampled_softmax import ActiveTable
from megatron_ove.optim.row_sparse_adamw import adamw_rows_, average_
from megatron_ove.parallel.random import mix64, stateless_seed

_SMALLEST_NORM = 1e-12
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CenterUpdate:
    """Weights, moments, step counts and norms of c_local rows and of a spare one that padding may write to.

    Attributes:
        weight: [c_local + 1, e] fp32 or bf16.
        mean: [c_local + 1, e] fp32 or bf16, or None.
        square: [c_local + 1, e] or [c_local + 1, 1] fp32.
        steps: [c_local + 1] int32.
        norms: [c_local + 1] fp32, Euclidean norms of `weight`.
    """

    def __init__(
        self,
        optim: ClassCenterOptimConfig,
        first_row: int,
        num_rows: int,
        embedding_size: int,
        *,
        seed: int,
        chunk_size: int,
        device: torch.device,
    ) -> None:
        self._optim, self._first_row, self._num_rows, self._chunk_size = optim, first_row, num_rows, chunk_size
        shape = (num_rows + 1, embedding_size)
        self.weight = torch.zeros(shape, dtype=_DTYPES[optim.weight_dtype], device=device)
        has_mean = optim.first_moment != "none"
        self.mean = torch.zeros(shape, dtype=_DTYPES[optim.first_moment], device=device) if has_mean else None
        width = embedding_size if optim.second_moment == "element" else 1
        self.square = torch.zeros(num_rows + 1, width, device=device)
        self.steps = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self.norms = torch.ones(num_rows + 1, device=device)
        columns = torch.arange(embedding_size, device=device)
        self._column_noise = mix64(columns, stateless_seed(seed, "rounding")).to(torch.int32)

    def fill(self, blocks: Iterable[tuple[int, Tensor]]) -> None:
        """Sets weights from (first row, [r, e] fp32) blocks."""
        for first, block in blocks:
            self.weight[first : first + len(block)] = block.to(self.weight)
        self.measure_norms()

    def measure_norms(self) -> None:
        """Measures the norms of all rows anew; to be called when weights were set from outside."""
        for start in range(0, self._num_rows, self._chunk_size):
            chunk = slice(start, min(start + self._chunk_size, self._num_rows))
            self.norms[chunk] = _norms_of(self.weight[chunk].float())

    def apply(self, table: ActiveTable, squares: Tensor, factor: Tensor, lr: float) -> None:
        """Updates the active rows; with `update: dense` all others too, by a gradient of 0.

        Args:
            table: the step's rows and gradient.
            squares: [a] fp32, squared norms of the rows' gradients, after clipping.
            factor: scalar, of the gradient: its scale and the clipping.
            lr: learning rate.
        """
        if table.is_fused:
            self._apply_fused(table, squares, factor, lr)
            return
        if self.mean is None and self._optim.second_moment == "row":
            self._apply_linear(table, squares, factor, lr)
        else:
            for chunk, weight in table.stored_chunks():
                weight = weight.float()
                gradient = self.gradient_of(table, chunk, weight, factor)
                self._update(table.active.rows[chunk], weight, gradient, squares[chunk], lr)
        if self._optim.update == "dense":
            self._update_idle(table.active.rows, lr)

    def _apply_fused(self, table: ActiveTable, squares: Tensor, factor: Tensor, lr: float) -> None:
        optim, gradient, rows = self._optim, table.gradient, table.active.rows
        triton_backend.update_rows(
            self.weight,
            self.norms,
            self.mean,
            self.square,
            self.steps,
            rows,
            *gradient.factors(),
            gradient.radial,
            squares,
            factor,
            lr=lr,
            beta1=optim.beta1,
            beta2=optim.beta2,
            epsilon=optim.epsilon,
            weight_decay=optim.weight_decay,
            row_noise=self._row_noise(rows, self.steps[rows] + 1) if self.weight.dtype == torch.bfloat16 else None,
            column_noise=self._column_noise,
            compute_dtype=table.compute_dtype,
        )

    def gradient_of(self, table: ActiveTable, chunk: slice, weight: Tensor, factor: Tensor) -> Tensor:
        """Returns the gradient of rows `chunk` themselves, [r, e] fp32 times `factor`, back through the normalization.

        Args:
            table: the step's rows and gradient.
            chunk: active rows.
            weight: [r, e] fp32, these rows.
            factor: scalar.
        """
        scale, along = self._gradient_factors(table, factor, chunk)
        return table.gradient.add_rows_to(weight * -along, chunk, scale)

    def _gradient_factors(self, table: ActiveTable, factor: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """Returns [r, 1] each: the gradient of row w is first * c x - second * w."""
        norms = self.norms[table.active.rows[chunk]]
        scale = factor / norms
        return scale[:, None], (scale / norms * table.gradient.radial[chunk])[:, None]

    def _apply_linear(self, table: ActiveTable, squares: Tensor, factor: Tensor, lr: float) -> None:
        """What `_update` does, for all active rows, without a first moment and with one second moment a row.

        The update is then the gradient times a number that is known before it, so the product that forms the gradient
        adds it to the weights at once.
        """
        optim, rows, everything = self._optim, table.active.rows, slice(None)
        count, square = self.steps[rows] + 1, self.square[rows]
        average_(square, squares[:, None] / self.weight.shape[1], count, optim.beta2)
        rate = lr / (square.sqrt() + optim.epsilon)
        scale, along = self._gradient_factors(table, factor, everything)
        kept, added = along.mul_(rate).add_(1 - lr * optim.weight_decay), scale.mul_(-rate)
        for chunk, weight in table.stored_chunks():
            weight = weight.float().mul_(kept[chunk])
            table.gradient.add_rows_to(weight, chunk, added[chunk])
            self._store_weights(rows[chunk], weight, count[chunk])
        self.square.index_copy_(0, rows, square)
        self.steps.index_copy_(0, rows, count)

    def _update(self, rows: Tensor, weight: Tensor, gradient: Tensor, squares: Tensor, lr: float) -> None:
        optim = self._optim
        count = self.steps[rows] + 1
        square = self.square[rows]
        mean = None if self.mean is None else self.mean.index_select(0, rows).float()
        by_row = optim.second_moment == "row"
        adamw_rows_(
            weight,
            mean,
            square,
            count,
            gradient=gradient,
            gradient_square=squares[:, None] / weight.shape[1] if by_row else gradient.square(),
            lr=lr,
            beta1=optim.beta1,
            beta2=optim.beta2,
            epsilon=optim.epsilon,
            weight_decay=optim.weight_decay,
        )
        if mean is not None and self.mean is not None:
            self.mean.index_copy_(0, rows, mean.to(self.mean.dtype))
        self._store_weights(rows, weight, count)
        self.square.index_copy_(0, rows, square)
        self.steps.index_copy_(0, rows, count)

    def _store_weights(self, rows: Tensor, weight: Tensor, count: Tensor) -> None:
        if self.weight.dtype == torch.bfloat16:
            weight = self._round(weight, rows, count)
        self.weight.index_copy_(0, rows, weight.to(self.weight.dtype))
        self.norms.index_copy_(0, rows, _norms_of(weight))

    def _update_idle(self, active: Tensor, lr: float) -> None:
        is_idle = torch.ones(self._num_rows + 1, dtype=torch.bool, device=active.device)
        is_idle[active] = False
        is_idle[-1] = False
        for part in is_idle.nonzero().flatten().split(self._chunk_size):
            weight = self.weight[part].float()
            self._update(part, weight, torch.zeros_like(weight), weight.new_zeros(len(part)), lr)

    def _round(self, weight: Tensor, rows: Tensor, count: Tensor) -> Tensor:
        """Rounds fp32 to bf16 values at random, up or down, so that the mean is kept; returns fp32.

        Without it an update below half a unit in the last place would always be lost. The noise is a function of (row
        of the whole table, its update count, column), so it depends neither on ranks nor on a generator's state.
        """
        noise = (self._row_noise(rows, count)[:, None] ^ self._column_noise) & 0xFFFF
        return (weight.view(torch.int32) + noise).bitwise_and_(-0x10000).view(torch.float32)

    def _row_noise(self, rows: Tensor, count: Tensor) -> Tensor:
        return mix64(rows + self._first_row, count).to(torch.int32)


def _norms_of(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1).clamp_(min=_SMALLEST_NORM)
