"""The class-center heads' large products on a GPU, through Triton: statistics, gradients, norms, update.

What is moved, for a active rows of e components (4 or 2 bytes each), B samples and a cosine buffer of q bytes an entry:
* `gather_directions`, once a step: reads a*e, writes a*e bf16; the two products below then read bf16 without an index.
  They also gather by themselves, which for one microbatch a step moves less (rows read twice, nothing written).
* `statistics`: reads the rows once from memory (programs of the same rows run side by side and share them in L2),
  writes q*a*B bytes; 2*a*B*e operations. Exponentials, filter, own labels and class sets act on the tile in place.
* `gradients`: reads and writes q*a*B bytes for the coefficients, which replace the cosines, then reads them and the
  rows once more; 2*a*B*e operations. Few output tiles, so the sum over a is cut into as many parts as fill the device.
* `square_norms`: reads q*a*B bytes; 4*a*B*B operations (the Gram matrix counts as two bf16 matrices).
* `update_rows`: reads q*a*B bytes, reads and writes each row and its moments once; 2*a*B*e operations.
On a device with 4.8 TB/s and 790 Tflop/s in bf16, a = 100,000, e = 1,024, B = 512, fp32 rows and first moments and one
second moment a row: 3.1 GB = 0.64 ms and 0.42 Tflop = 0.53 ms for one microbatch a step; without first moments 2.3 GB.

bf16 cosine buffers hold cosines as float16 (8 times finer, which exp(64 cos) needs) and coefficients as bf16, which
need its range. Nothing waits for the device, and the same inputs give the same bits.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_ove.heads.margin_softmax import MarginSoftmax


def is_available(device: torch.device) -> bool:
    """Returns whether kernels run on `device`: Triton is installed, and it is a CUDA device or Triton interprets."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or _interprets()


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("megatron_ove.heads.triton_kernels")


# Products and sums may fuse to one rounding. Triton 3.9 warns when nobody says so, later versions do not fuse.
_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class _Tiles:
    """Extents of a tile in active rows, samples and components, and how it is run."""

    rows: int
    samples: int
    size: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {
            "BLOCK_R": self.rows,
            "BLOCK_B": self.samples,
            "BLOCK_E": self.size,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **_OPTIONS,
        }


# 128 x 256 fp32 sums take half the registers of a Hopper SM, which leaves one program on it and its shared memory to
# three stages of operands; 64 components are one 128-byte line of bf16. fp32 products run without tensor cores.
_STATISTICS = {64: _Tiles(128, 64, 64, 4, 3), 128: _Tiles(128, 128, 64, 8, 3), 256: _Tiles(128, 256, 64, 8, 3)}
_GRADIENTS = {64: _Tiles(64, 64, 256, 8, 3), 128: _Tiles(64, 128, 128, 8, 3), 256: _Tiles(64, 128, 256, 8, 3)}
_SQUARE_NORMS = {64: _Tiles(128, 64, 64, 4, 3), 128: _Tiles(128, 128, 64, 8, 3), 256: _Tiles(128, 128, 64, 8, 3)}
_UPDATE = {64: _Tiles(64, 64, 128, 8, 2), 128: _Tiles(64, 64, 128, 8, 3), 256: _Tiles(64, 64, 128, 8, 3)}
_FP32 = _Tiles(64, 64, 32, 4, 2)
_INTERPRETED = _Tiles(16, 16, 16, 1, 1)


def _tiles(of_batch: dict[int, _Tiles], batch: int, dtype: torch.dtype) -> _Tiles:
    if _interprets():
        return _INTERPRETED
    if dtype == torch.float32:
        return _FP32
    return of_batch[min((extent for extent in of_batch if extent >= batch), default=max(of_batch))]


def gather_directions(table: Tensor, rows: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the active rows, normalized: [a, e] of `dtype`. Arguments as in `statistics`."""
    directions = torch.empty(rows.numel(), table.shape[1], dtype=dtype, device=table.device)
    if directions.numel():
        block_rows, block_size = (16, 16) if _interprets() else (8, 512)
        grid = (_blocks(rows.numel(), block_rows), _blocks(table.shape[1], block_size))
        extents = {"BLOCK_R": block_rows, "BLOCK_E": block_size}
        _kernels().gather_kernel[grid](table, rows, norms, directions, *directions.shape, **extents, **_OPTIONS)
    return directions


def statistics(
    x: Tensor,
    table: Tensor,
    rows: Tensor | None,
    norms: Tensor | None,
    weights: Tensor,
    targets: Tensor,
    softmax: MarginSoftmax,
    cosines: Tensor | None = None,
    *,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns what this rank's active rows contribute to the softmax of each class set.

    Args:
        x: [b, e] fp32, normalized embeddings.
        table: [c + 1, e] fp32 or bf16 class centers and one spare row; or the result of `gather_directions`.
        rows: [a] int64, active rows; c is padding. None when `table` holds the directions.
        norms: [c + 1] fp32, L2 norm of each row; None when `table` holds the directions.
        weights: [a, s] fp32, factor of each row's exponential in each of s <= 16 class sets; 0 for padding.
        targets: [k, b] integers, position in `rows` of each of k <= 16 labels, -1 when it is not here.
        softmax: scale and filter; |scale * cosine| must stay below 80, for no maximum is subtracted.
        cosines: [a, b'] fp32 or bf16 with unit column stride, written for `gradients` to read; see the module. Full
            speed needs rows that start at multiples of 32 bytes and b' = b rounded up to a multiple of 16; columns
            beyond b become coefficients of 0.
        compute_dtype: float32 or bfloat16 of the operands of the product; sums are fp32.

    Returns:
        sums: [s, b] fp32, weights^T exp(scale * cosine) without the samples' own labels and what the filter removes.
        target_cosines: [k, b] fp32, cosine with each label's row; 0 when it is not here.
    """
    num_samples, (num_active, num_sets), num_labels = x.shape[0], weights.shape, targets.shape[0]
    if not num_samples or not num_active:
        return x.new_zeros(num_sets, num_samples), x.new_zeros(num_labels, num_samples)
    batch, size = num_samples if cosines is None else cosines.shape[1], x.shape[1]
    x, targets = _pad_rows(x, batch), _pad_columns(targets.to(torch.int32), batch, -1)
    target_cosines = x.new_zeros(num_labels, batch)
    kernels, tiles = _kernels(), _tiles(_STATISTICS, batch, compute_dtype)
    row_blocks = _blocks(num_active, tiles.rows)
    partial = x.new_empty(row_blocks, num_sets, batch)
    stored = None if cosines is None else _as_cosines(cosines)
    kernels.statistics_kernel[(row_blocks * _blocks(batch, tiles.samples),)](
        *(x.to(compute_dtype), table, rows, norms, weights, targets, stored, partial),
        *(num_active, batch, size, num_labels, 0 if stored is None else stored.stride(0)),
        *(softmax.logit_scale, softmax.interclass_filter),
        NUM_SETS=num_sets,
        SETS=16,
        LABELS=_label_extent(num_labels),
        FILTER=_filter(softmax),
        GATHERS=rows is not None,
        STORES=stored is not None,
        **tiles.launch,
    )
    options = {"LABELS": _label_extent(num_labels), "GATHERS": rows is not None, **_OPTIONS}
    kernels.target_cosine_kernel[(batch,)](
        *(x, table, rows, norms, targets, target_cosines, batch, size, num_labels),
        BLOCK_E=16 if _interprets() else 256,
        **options,
    )
    return partial.sum(0)[:, :num_samples], target_cosines[:, :num_samples]


def gradients(
    table: Tensor,
    rows: Tensor | None,
    norms: Tensor | None,
    weights: Tensor,
    targets: Tensor,
    softmax: MarginSoftmax,
    cosines: Tensor,
    grad_sums: Tensor,
    grad_targets: Tensor,
    radial: Tensor,
    *,
    compute_dtype: torch.dtype,
) -> Tensor:
    """Returns the gradient of the normalized embeddings, and turns cosines into the rows' coefficients.

    The gradient of row r is (coefficients_r @ x - radial_r * direction_r) / norm_r, when all microbatches were here.

    Args:
        cosines: [a, b'], as `statistics` wrote them; overwritten by dL/dcosine.
        grad_sums: [s, b] fp32, dL/dsums.
        grad_targets: [k, b] fp32, dL/dtarget_cosines.
        radial: [a] fp32, sum over samples of dL/dcosine * cosine; added to.
        table, rows, norms, weights, targets, softmax, compute_dtype: as in `statistics`.

    Returns:
        [b, e] fp32, this rank's part.
    """
    (num_active, batch), size, (num_labels, num_samples) = cosines.shape, table.shape[1], targets.shape
    if not num_samples or not num_active:
        return torch.zeros(num_samples, size, device=table.device)
    kernels, extents = _kernels(), {"BLOCK_R": 16, "BLOCK_B": 16} if _interprets() else {"BLOCK_R": 32, "BLOCK_B": 128}
    kernels.coefficient_kernel[(_blocks(num_active, extents["BLOCK_R"]),)](
        *(_as_cosines(cosines), cosines, weights, _pad_columns(targets.to(torch.int32), batch, -1)),
        *(_pad_columns(grad_sums, batch, 0), _pad_columns(grad_targets, batch, 0), radial),
        *(num_active, batch, num_labels, cosines.stride(0), softmax.logit_scale, softmax.interclass_filter),
        NUM_SETS=weights.shape[1],
        LABELS=_label_extent(num_labels),
        FILTER=_filter(softmax),
        **extents,
        num_warps=8,
        **_OPTIONS,
    )
    tiles = _tiles(_GRADIENTS, batch, compute_dtype)
    output_tiles = _blocks(batch, tiles.samples) * _blocks(size, tiles.size)
    splits = max(1, min(_num_processors(table.device) // output_tiles, _blocks(num_active, 4 * tiles.rows)))
    rows_per_split = _blocks(_blocks(num_active, splits), tiles.rows) * tiles.rows
    splits = _blocks(num_active, rows_per_split)
    partial = torch.empty(splits, batch, size, device=table.device)
    kernels.embedding_gradient_kernel[(splits * output_tiles,)](
        *(cosines, table, rows, norms, partial, num_active, batch, size, cosines.stride(0), rows_per_split),
        GATHERS=rows is not None,
        BF16=compute_dtype == torch.bfloat16,
        **tiles.launch,
    )
    return partial.sum(0)[:num_samples]


def square_norms(coefficients: Tensor, gram: Tensor, radial: Tensor, *, compute_dtype: torch.dtype) -> Tensor:
    """Returns |coefficients_r @ x|^2 - radial_r^2, [a] fp32, without forming the product.

    Args:
        coefficients: [a, b], of all samples of the step; columns of 0 where padded, and rows of 0 in x.
        gram: [b, b] fp32, x @ x^T of their embeddings.
        radial: [a] fp32, as `gradients` left it.
        compute_dtype: as in `statistics`.
    """
    num_active, batch = coefficients.shape
    result = torch.zeros(num_active, device=coefficients.device)
    if not batch or not num_active:
        return result
    high = gram.to(compute_dtype).contiguous()
    low = (gram - high.float()).to(compute_dtype)
    tiles = _tiles(_SQUARE_NORMS, batch, compute_dtype)
    _kernels().square_norm_kernel[(_blocks(num_active, tiles.rows),)](
        *(coefficients, high, low, radial, result, num_active, batch, coefficients.stride(0)),
        BF16=compute_dtype == torch.bfloat16,
        BLOCK_R=tiles.rows,
        BLOCK_B=tiles.samples,
        BLOCK_K=tiles.size,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **_OPTIONS,
    )
    return result


def accumulate(total: Tensor, coefficients: Tensor, x: Tensor, *, compute_dtype: torch.dtype) -> None:
    """Adds coefficients [a, b] @ x [b, e] to `total` [a, e] fp32: for steps of more samples than components."""
    (num_active, batch), size = coefficients.shape, x.shape[1]
    if not batch or not num_active:
        return
    tiles = _tiles(_UPDATE, batch, compute_dtype)
    _kernels().accumulate_kernel[(_blocks(num_active, tiles.rows) * _blocks(size, tiles.size),)](
        *(coefficients, x.to(compute_dtype).contiguous(), total, num_active, batch, size, coefficients.stride(0)),
        **tiles.launch,
    )


def update_rows(
    table: Tensor,
    norms: Tensor,
    mean: Tensor | None,
    square: Tensor,
    steps: Tensor,
    rows: Tensor,
    gradient: Tensor,
    x: Tensor | None,
    radial: Tensor,
    square_norms: Tensor | None,
    factor: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    row_noise: Tensor | None = None,
    column_noise: Tensor | None = None,
    compute_dtype: torch.dtype,
) -> None:
    """Forms the gradients of the active rows and applies AdamW to them, in place and in one pass.

    Args:
        table: [c + 1, e] fp32 or bf16; rows c and above are padding and neither read nor written, here and below.
        norms: [c + 1] fp32, of the rows as stored; updated.
        mean: [c + 1, e] fp32 or bf16, bias-corrected running mean of gradients; None = the gradient itself is followed.
        square: fp32, bias-corrected running mean of squared gradients: [c + 1, e], or [c + 1, 1] with one number a row.
        steps: [c + 1] int32, updates of each row so far, by which both are corrected.
        rows: [a] int64, distinct up to padding.
        gradient: [a, b] coefficients of all samples of the step; or [a, e] fp32, their product with `x`.
        x: [b, e], normalized embeddings of these samples; None = `gradient` is the product.
        radial: [a] fp32.
        square_norms: [a] fp32, of the gradients after `factor`; read only when `square` has one number a row.
        factor: 0-d fp32, of all gradients: their scale and the clipping.
        lr, beta1, beta2, epsilon, weight_decay: as in `adamw_rows_`.
        row_noise: [a] int32, with column_noise [e] int32: (row_noise ^ column_noise) & 0xFFFF is added to the bits of
            the fp32 weight before it is cut to bf16. None = rounded to nearest. Only for bf16 tables.
        compute_dtype: as in `statistics`.
    """
    num_active, num_rows, size = rows.numel(), steps.numel() - 1, table.shape[1]
    if not num_active or not num_rows:
        return
    count = steps[rows].double() + 1
    batch = 0 if x is None else len(x)
    tiles = _tiles(_UPDATE, batch, compute_dtype)
    operand = None if x is None else x.to(compute_dtype).contiguous()
    _kernels().update_kernel[(_blocks(num_active, tiles.rows),)](
        *(table, norms, mean, square, steps, rows, gradient, operand, radial),
        *(square_norms, _rate(beta1, count), _rate(beta2, count), factor, row_noise, column_noise),
        *(num_active, num_rows, batch, size, gradient.stride(0), lr, 1 - lr * weight_decay, epsilon),
        FACTORED=x is not None,
        FIRST_MOMENT=mean is not None,
        BY_ELEMENT=square.shape[1] > 1,
        DITHERS=row_noise is not None and table.dtype == torch.bfloat16,
        **tiles.launch,
    )


def _rate(beta: float, count: Tensor) -> Tensor:
    """Share of the new value in the count-th value of a bias-corrected running average."""
    return ((1 - beta) / (1 - beta**count)).float()


def _blocks(extent: int, block: int) -> int:
    return -(-extent // block)


def _pad_rows(tensor: Tensor, extent: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, extent - tensor.shape[0])).contiguous()


def _pad_columns(tensor: Tensor, extent: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, extent - tensor.shape[1]), value=value).contiguous()


def _label_extent(num_labels: int) -> int:
    return 1 << max(0, num_labels - 1).bit_length()


def _filter(softmax: MarginSoftmax) -> str:
    return softmax.interclass_filter_mode if softmax.interclass_filter < 1 else "off"


def _as_cosines(buffer: Tensor) -> Tensor:
    return buffer.view(torch.float16) if buffer.dtype == torch.bfloat16 else buffer


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
