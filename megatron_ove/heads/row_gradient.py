"""The gradient of a step's active rows, collected over microbatches: as factors while these are smaller, else dense.

With x the normalized embeddings [B, e] of all samples of the step, d the normalized rows and c [a, B] the gradient of
the cosines, the gradient of row r with norm n is (c_r x - (c_r . cos_r) d_r) / n. As long as B <= e the factors c and x
are no larger than the product, which is then formed chunk by chunk where it is used and never stored. Its norms
follow from the Gram matrix of x: |c_r x|^2 = c_r (x x^T) c_r.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.heads import triton_backend


class RowGradient(ABC):
    """Gradient with respect to the normalized rows, and its part along each row.

    Attributes:
        radial: [a] fp32, c_r . cos_r, which the normalization takes out.
    """

    radial: Tensor

    @abstractmethod
    def reserve(self, num_samples: int) -> Tensor | None:
        """Returns where a microbatch may leave its cosines [a, num_samples] fp32 for its backward pass, or None."""

    @abstractmethod
    def add(self, chunk: slice, coefficients: Tensor, embeddings: Tensor, place: Tensor | None) -> None:
        """Adds coefficients^T-weighted embeddings to rows `chunk`.

        Args:
            chunk: active rows.
            coefficients: [r, b] fp32, gradient of the cosines of these rows; may be `place[chunk]` itself.
            embeddings: [b, e] fp32, normalized.
            place: what `reserve` returned for the microbatch.
        """

    @abstractmethod
    def finish_microbatch(self, embeddings: Tensor, place: Tensor | None) -> None:
        """Says that all chunks of a microbatch were added."""

    @abstractmethod
    def square_norms(self) -> Tensor:
        """Returns |c_r x|^2 - radial_r^2, [a] fp32: the squared norms of the gradient of rows of norm 1.

        Ends the collection; to be called before `add_rows_to`.
        """

    @abstractmethod
    def add_rows_to(self, total: Tensor, chunk: slice, factors: Tensor) -> Tensor:
        """Adds factor_r (c_r x) for rows `chunk` to a tensor and returns it.

        Args:
            total: [r, e] fp32.
            chunk: active rows.
            factors: [r, 1] fp32.
        """

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor | None]:
        """Returns (c, x) or (c x, None), for kernels that take either."""


class FactoredRowGradient(RowGradient):
    """Keeps (c, x)."""

    def __init__(
        self,
        coefficients: Tensor,
        embedding_size: int,
        *,
        compute_dtype: torch.dtype,
        chunk_size: int,
        padding: int = 1,
    ):
        """
        Args:
            coefficients: [a, B] fp32 or bf16, memory for c; its contents are lost.
            embedding_size: e.
            compute_dtype: of the operands of c x.
            chunk_size: rows that are worked on at a time.
            padding: microbatches take a multiple of this many columns; more than 1 = Triton kernels do the work.
        """
        self.coefficients = coefficients
        # fp32 also where coefficients are not: norms are small differences of these.
        self.radial = torch.zeros(coefficients.shape[0], device=coefficients.device)
        self.embeddings = torch.zeros(coefficients.shape[1], embedding_size, device=coefficients.device)
        self._compute_dtype, self._chunk_size, self._padding = compute_dtype, chunk_size, padding
        self._memory: tuple[Tensor, Tensor] | None = None
        self._reserved = 0
        self._finished: list[tuple[int, int]] = []

    def reserve(self, num_samples: int) -> Tensor:
        first, self._reserved = self._reserved, self._reserved + -(-num_samples // self._padding) * self._padding
        if self._reserved > self.coefficients.shape[1]:
            raise RuntimeError(f"{self._reserved} samples in a step that was begun with {self.coefficients.shape[1]}")
        return self.coefficients[:, first : self._reserved]

    def add(self, chunk: slice, coefficients: Tensor, embeddings: Tensor, place: Tensor | None) -> None:
        """Nothing to do: the coefficients already are where they belong."""

    def finish_microbatch(self, embeddings: Tensor, place: Tensor | None) -> None:
        assert place is not None
        first = int(place.storage_offset())
        self._finished.append((first, first + int(place.shape[1])))
        self.embeddings[first : first + embeddings.shape[0]] = embeddings

    def square_norms(self) -> Tensor:
        self._keep_finished()
        self._operand = self.embeddings.to(self._compute_dtype)
        gram = self.embeddings @ self.embeddings.T
        if self._padding > 1:
            tangential = triton_backend.square_norms(
                self.coefficients, gram, self.radial, compute_dtype=self._compute_dtype
            )
            return _at_least_rounding(tangential, self.radial, self._compute_dtype)
        squares = torch.empty_like(self.radial)
        gram = gram.to(self._compute_dtype)
        for start in range(0, squares.numel(), self._chunk_size):
            chunk = slice(start, start + self._chunk_size)
            part = self.coefficients[chunk]
            squares[chunk] = (part.to(gram.dtype) @ gram).float().mul_(part).sum(1)
        return _without_radial(squares, self.radial, self._compute_dtype)

    def add_rows_to(self, total: Tensor, chunk: slice, factors: Tensor) -> Tensor:
        scaled = self.coefficients[chunk].float() * factors
        if self._operand.dtype == total.dtype:
            return total.addmm_(scaled, self._operand)
        product, widened = self._product_memory(total)
        torch.mm(scaled.to(self._operand.dtype), self._operand, out=product)
        return total.add_(widened.copy_(product))

    def _product_memory(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """Returns memory shaped like `total`, in the compute dtype and in fp32; fresh memory costs much."""
        if self._memory is None or self._memory[0].shape[0] < total.shape[0]:
            self._memory = torch.empty_like(total, dtype=self._operand.dtype), torch.empty_like(total)
        return self._memory[0][: total.shape[0]], self._memory[1][: total.shape[0]]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.coefficients, self.embeddings

    def _keep_finished(self) -> None:
        """Columns of a microbatch without a backward pass hold cosines, or nothing: they are no gradient."""
        ends = [0, *(end for _, end in sorted(self._finished))]
        starts = [*(start for start, _ in sorted(self._finished)), self.coefficients.shape[1]]
        for end, start in zip(ends, starts, strict=True):
            self.coefficients[:, end:start] = 0


class DenseRowGradient(RowGradient):
    """Keeps c x, for steps with more samples than an embedding has elements and for tables with replicas."""

    def __init__(
        self, total: Tensor, replicas: dist.ProcessGroup | None, *, compute_dtype: torch.dtype, is_fused: bool = False
    ) -> None:
        """
        Args:
            total: [a, e] fp32, memory for c x; its contents are lost.
            replicas: ranks that hold the same rows and see different samples.
            compute_dtype: of the operands of the cosines, and of c x in Triton.
            is_fused: whether Triton kernels do the work.
        """
        self._compute_dtype, self._is_fused = compute_dtype, is_fused
        self.radial = total.new_zeros(total.shape[0])
        self.total = total.zero_()
        self._replicas = replicas

    def reserve(self, num_samples: int) -> None:
        return None

    def add(self, chunk: slice, coefficients: Tensor, embeddings: Tensor, place: Tensor | None) -> None:
        if not self._is_fused:
            self.total[chunk].addmm_(coefficients, embeddings)
        else:
            triton_backend.accumulate(self.total[chunk], coefficients, embeddings, compute_dtype=self._compute_dtype)

    def finish_microbatch(self, embeddings: Tensor, place: Tensor | None) -> None:
        """Nothing to do."""

    def square_norms(self) -> Tensor:
        if self._replicas is not None and self.radial.numel():
            dist.all_reduce(self.total, group=self._replicas)
            dist.all_reduce(self.radial, group=self._replicas)
        squares = torch.linalg.vector_norm(self.total, dim=1).square_()
        return _without_radial(squares, self.radial, self._compute_dtype)

    def add_rows_to(self, total: Tensor, chunk: slice, factors: Tensor) -> Tensor:
        return total.addcmul_(self.total[chunk], factors)

    def factors(self) -> tuple[Tensor, None]:
        return self.total, None


def _without_radial(squares: Tensor, radial: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """squares - radial^2, in place."""
    return _at_least_rounding(squares.addcmul_(radial, radial, value=-1), radial, compute_dtype)


def _at_least_rounding(squares: Tensor, radial: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Raises a difference to what the rounding of cosines can hide in it, in place.

    Where embeddings nearly coincide with a center the difference is far smaller than its two terms. Too small a second
    moment would make for a huge step, too large a one for a small step.
    """
    relative = 2.0**-7 if compute_dtype == torch.bfloat16 else 1e-6
    return torch.maximum(squares, radial.square().mul_(relative), out=squares)
