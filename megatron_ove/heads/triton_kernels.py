"""Triton kernels of the class-center heads; `triton_backend` launches them and says what they cost.

Names: a active rows (`num_active`), b samples (`batch`), e components (`size`), s class sets, k labels. A tile has
BLOCK_R active rows, BLOCK_B samples and BLOCK_E components. Products have fp32 accumulators; bf16 operands go to the
tensor cores, fp32 ones are multiplied as fp32. Every result is written by one program: nothing is added atomically, so
the same inputs give the same bits.

The number of active rows differs from step to step; `do_not_specialize` keeps Triton from compiling a kernel once more
when it happens to be a multiple of 16. No address is a multiple of it.
"""

# ruff: noqa: N803
# Upper-case arguments are compile-time constants, as everywhere in Triton.

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b, total):
    if _INTERPRETED:  # which would multiply the bits of bf16 numbers as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _next_label(targets, above):
    """Each sample's smallest label position > above, [b] int32 from [k, b]; the largest int when none is left."""
    return tl.min(tl.where(targets > above[None, :], targets, 2147483647), axis=0)


@triton.jit
def _inverse_norm(norms_ptr, row, mask):
    return 1.0 / tl.maximum(tl.load(norms_ptr + row, mask=mask, other=1.0), 1e-12)


@triton.jit
def _targets(targets_ptr, b, batch, num_labels, LABELS: tl.constexpr):
    label = tl.arange(0, LABELS)
    is_label = (label < num_labels)[:, None] & (b < batch)[None, :]
    return tl.load(targets_ptr + label[:, None] * batch + b[None, :], mask=is_label, other=-1)


@triton.jit(do_not_specialize=["num_active"])
def gather_kernel(
    table_ptr, rows_ptr, norms_ptr, out_ptr, num_active, size, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """out[a, e] = table[rows] / norms[rows], in the type of `out`."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = tl.load(rows_ptr + r, mask=r < num_active, other=0)
    inverse = _inverse_norm(norms_ptr, row, r < num_active)
    mask = (r < num_active)[:, None] & (k < size)[None, :]
    tile = tl.load(table_ptr + row[:, None] * size + k[None, :], mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + r.to(tl.int64)[:, None] * size + k[None, :]
    tl.store(out, (tile * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_active"])
def statistics_kernel(
    x_ptr, table_ptr, rows_ptr, norms_ptr, weights_ptr, targets_ptr, cosines_ptr, sums_ptr,
    num_active, batch, size, num_labels, cosine_stride, logit_scale, filter_above,
    NUM_SETS: tl.constexpr, SETS: tl.constexpr, LABELS: tl.constexpr, FILTER: tl.constexpr,
    GATHERS: tl.constexpr, STORES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Cosines of one tile, and what its rows add to the sums of exponentials: sums[row block, s, b].

    Programs of the same rows run side by side, so that all but the first find them in the L2 cache.
    """
    batch_blocks = tl.cdiv(batch, BLOCK_B)
    row_block = tl.program_id(0) // batch_blocks
    r = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    b = (tl.program_id(0) % batch_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_row = r < num_active
    row = r.to(tl.int64)
    if GATHERS:
        row = tl.load(rows_ptr + r, mask=is_row, other=0)
    cosines = tl.zeros((BLOCK_R, BLOCK_B), tl.float32)
    for start in range(0, size, BLOCK_E):
        k = start + tl.arange(0, BLOCK_E)
        w_mask = is_row[:, None] & (k < size)[None, :]
        x_mask = (k < size)[:, None] & (b < batch)[None, :]
        w = tl.load(table_ptr + row[:, None] * size + k[None, :], mask=w_mask, other=0.0)
        x = tl.load(x_ptr + b[None, :] * size + k[:, None], mask=x_mask, other=0.0)
        cosines = _dot(w.to(x.dtype), x, cosines)
    if GATHERS:
        cosines *= _inverse_norm(norms_ptr, row, is_row)[:, None]
    if STORES:
        place = cosines_ptr + r.to(tl.int64)[:, None] * cosine_stride + b[None, :]
        tl.store(place, cosines.to(cosines_ptr.dtype.element_ty), mask=is_row[:, None] & (b < batch)[None, :])
    # Labels of the samples that lie among these rows, one per sample and turn: nearly always none or one turn.
    targets = _targets(targets_ptr, b, batch, num_labels, LABELS)
    label = _next_label(targets, tl.zeros((BLOCK_B,), tl.int32) + (row_block * BLOCK_R - 1))
    while tl.min(label, axis=0) < (row_block + 1) * BLOCK_R:
        cosines = tl.where(r[:, None] == label[None, :], float("-inf"), cosines)
        label = _next_label(targets, label)
    exponentials = tl.exp(cosines * logit_scale)
    if FILTER == "zero":
        exponentials = tl.where(cosines > filter_above, 1.0, exponentials)
    if FILTER == "mask":
        exponentials = tl.where(cosines > filter_above, 0.0, exponentials)
    sets = tl.arange(0, SETS)
    weight_mask = (sets < NUM_SETS)[:, None] & is_row[None, :]
    weights = tl.load(weights_ptr + r[None, :] * NUM_SETS + sets[:, None], mask=weight_mask, other=0.0)
    sums = _weighted_sums(weights, exponentials, x_ptr.dtype.element_ty)
    place = sums_ptr + (row_block * NUM_SETS + sets)[:, None] * batch + b[None, :]
    tl.store(place, sums, mask=(sets < NUM_SETS)[:, None] & (b < batch)[None, :])


@triton.jit
def _weighted_sums(weights, exponentials, dtype: tl.constexpr):
    """weights [s, r] times exponentials [r, b]; for bf16 the weights count as two bf16 numbers: 1 / p is not one."""
    sums = tl.zeros((weights.shape[0], exponentials.shape[1]), tl.float32)
    high = weights.to(dtype)
    if dtype == tl.bfloat16:
        low = (weights - high.to(tl.float32)).to(dtype)
        sums = _dot(low, exponentials.to(dtype), sums)
    return _dot(high, exponentials.to(dtype), sums)


@triton.jit
def target_cosine_kernel(
    x_ptr, table_ptr, rows_ptr, norms_ptr, targets_ptr, out_ptr, batch, size, num_labels,
    LABELS: tl.constexpr, GATHERS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[k, b] = cosine of sample b and the row at its k-th label's position, in fp32; 0 for positions < 0."""
    b = tl.program_id(0)
    label = tl.arange(0, LABELS)
    target = tl.load(targets_ptr + label * batch + b, mask=label < num_labels, other=-1)
    is_here = target >= 0
    row = target.to(tl.int64)
    if GATHERS:
        row = tl.load(rows_ptr + target, mask=is_here, other=0)
    cosine = tl.zeros((LABELS,), tl.float32)
    for start in range(0, size, BLOCK_E):
        k = start + tl.arange(0, BLOCK_E)
        x = tl.load(x_ptr + b * size + k, mask=k < size, other=0.0)
        mask = is_here[:, None] & (k < size)[None, :]
        w = tl.load(table_ptr + row[:, None] * size + k[None, :], mask=mask, other=0.0).to(tl.float32)
        cosine += tl.sum(w * x[None, :], axis=1)
    if GATHERS:
        cosine *= _inverse_norm(norms_ptr, row, is_here)
    tl.store(out_ptr + label * batch + b, cosine, mask=label < num_labels)


@triton.jit(do_not_specialize=["num_active"])
def coefficient_kernel(
    cosines_ptr, coefficients_ptr, weights_ptr, targets_ptr, grad_sums_ptr, grad_targets_ptr, radial_ptr,
    num_active, batch, num_labels, stride, logit_scale, filter_above,
    NUM_SETS: tl.constexpr, LABELS: tl.constexpr, FILTER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Turns cosines into their gradients, in the same memory; radial[r] += sum over samples of gradient * cosine."""
    first = tl.program_id(0) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    is_row = r < num_active
    radial = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        mask = is_row[:, None] & (b < batch)[None, :]
        place = r.to(tl.int64)[:, None] * stride + b[None, :]
        cosines = tl.load(cosines_ptr + place, mask=mask, other=0.0).to(tl.float32)
        slope = tl.zeros((BLOCK_R, BLOCK_B), tl.float32)
        for index in tl.static_range(NUM_SETS):
            weight = tl.load(weights_ptr + r * NUM_SETS + index, mask=is_row, other=0.0)
            grad = tl.load(grad_sums_ptr + index * batch + b, mask=b < batch, other=0.0)
            slope += weight[:, None] * grad[None, :]
        gradient = logit_scale * tl.exp(cosines * logit_scale) * slope
        if FILTER != "off":
            gradient = tl.where(cosines > filter_above, 0.0, gradient)
        targets = _targets(targets_ptr, b, batch, num_labels, LABELS)
        slots = tl.arange(0, LABELS)[:, None] * batch + b[None, :]
        grad_targets = tl.load(grad_targets_ptr + slots, mask=targets >= 0, other=0.0)
        label = _next_label(targets, tl.zeros((BLOCK_B,), tl.int32) + (first - 1))
        while tl.min(label, axis=0) < first + BLOCK_R:
            of_label = tl.sum(tl.where(targets == label[None, :], grad_targets, 0.0), axis=0)
            gradient = tl.where(r[:, None] == label[None, :], of_label[None, :], gradient)
            label = _next_label(targets, label)
        rounded = gradient.to(coefficients_ptr.dtype.element_ty)
        radial += tl.sum(tl.where(mask, rounded.to(tl.float32) * cosines, 0.0), axis=1)
        tl.store(coefficients_ptr + place, rounded, mask=mask)
    tl.store(radial_ptr + r, tl.load(radial_ptr + r, mask=is_row, other=0.0) + radial, mask=is_row)


@triton.jit(do_not_specialize=["num_active"])
def embedding_gradient_kernel(
    coefficients_ptr, table_ptr, rows_ptr, norms_ptr, partial_ptr,
    num_active, batch, size, stride, rows_per_split,
    GATHERS: tl.constexpr, BF16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """partial[split, b, e] = coefficients^T (table[rows] / norms[rows]) over the split's range of active rows."""
    batch_blocks = tl.cdiv(batch, BLOCK_B)
    tiles = batch_blocks * tl.cdiv(size, BLOCK_E)
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    b = (tile % batch_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = (tile // batch_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float32
    gradient = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    for start in range(split * rows_per_split, tl.minimum((split + 1) * rows_per_split, num_active), BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        is_row = r < num_active
        row = r.to(tl.int64)
        if GATHERS:
            row = tl.load(rows_ptr + r, mask=is_row, other=0)
        w_mask = is_row[:, None] & (k < size)[None, :]
        w = tl.load(table_ptr + row[:, None] * size + k[None, :], mask=w_mask, other=0.0)
        if GATHERS:
            w = w.to(tl.float32) * _inverse_norm(norms_ptr, row, is_row)[:, None]
        c_mask = is_row[:, None] & (b < batch)[None, :]
        c = tl.load(coefficients_ptr + r.to(tl.int64)[:, None] * stride + b[None, :], mask=c_mask, other=0.0)
        gradient = _dot(tl.trans(c.to(dtype)), w.to(dtype), gradient)
    place = partial_ptr + (split * batch + b).to(tl.int64)[:, None] * size + k[None, :]
    tl.store(place, gradient, mask=(b < batch)[:, None] & (k < size)[None, :])


@triton.jit(do_not_specialize=["num_active"])
def square_norm_kernel(
    coefficients_ptr, gram_ptr, gram_low_ptr, radial_ptr, out_ptr, num_active, batch, stride,
    BF16: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[r] = c_r G c_r^T - radial_r^2, but not below 0; as bf16, G counts as the sum of two matrices."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = r < num_active
    c_row = coefficients_ptr + r.to(tl.int64)[:, None] * stride
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float32
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        product = tl.zeros((BLOCK_R, BLOCK_B), tl.float32)
        for inner in range(0, batch, BLOCK_K):
            k = inner + tl.arange(0, BLOCK_K)
            c = tl.load(c_row + k[None, :], mask=is_row[:, None] & (k < batch)[None, :], other=0.0).to(dtype)
            mask = (k < batch)[:, None] & (b < batch)[None, :]
            place = k[:, None] * batch + b[None, :]
            product = _dot(c, tl.load(gram_ptr + place, mask=mask, other=0.0), product)
            if BF16:
                product = _dot(c, tl.load(gram_low_ptr + place, mask=mask, other=0.0), product)
        c = tl.load(c_row + b[None, :], mask=is_row[:, None] & (b < batch)[None, :], other=0.0).to(dtype)
        total += tl.sum(product * c.to(tl.float32), axis=1)
    radial = tl.load(radial_ptr + r, mask=is_row, other=0.0)
    tl.store(out_ptr + r, tl.maximum(total - radial * radial, 0.0), mask=is_row)


@triton.jit
def _store_weights(place, w, row_hash, column_hash, mask, DITHERS: tl.constexpr):
    """Stores a tile of weights and returns it as stored; bf16 rounds stochastically when there are hashes."""
    dtype = place.dtype.element_ty
    if DITHERS:
        noise = (row_hash[:, None] ^ column_hash[None, :]) & 0xFFFF
        w = ((w.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
    stored = w.to(dtype)
    tl.store(place, stored, mask=mask)
    return stored.to(tl.float32)


@triton.jit
def _row_gradient(
    coefficients_ptr, x_ptr, r, k, is_row, batch, size, stride,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """coefficients [r, b] times x [b, k] over all samples, fp32."""
    gradient = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        c_mask = is_row[:, None] & (b < batch)[None, :]
        c = tl.load(coefficients_ptr + r.to(tl.int64)[:, None] * stride + b[None, :], mask=c_mask, other=0.0)
        x_mask = (b < batch)[:, None] & (k < size)[None, :]
        x = tl.load(x_ptr + b[:, None] * size + k[None, :], mask=x_mask, other=0.0)
        gradient = _dot(c.to(x.dtype), x, gradient)
    return gradient


@triton.jit(do_not_specialize=["num_active"])
def accumulate_kernel(
    coefficients_ptr, x_ptr, total_ptr, num_active, batch, size, stride,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """total[a, e] += coefficients @ x."""
    size_blocks = tl.cdiv(size, BLOCK_E)
    r = (tl.program_id(0) // size_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = (tl.program_id(0) % size_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_row = r < num_active
    gradient = _row_gradient(coefficients_ptr, x_ptr, r, k, is_row, batch, size, stride, BLOCK_R, BLOCK_B, BLOCK_E)
    mask = is_row[:, None] & (k < size)[None, :]
    place = total_ptr + r.to(tl.int64)[:, None] * size + k[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + gradient, mask=mask)


@triton.jit(do_not_specialize=["num_active"])
def update_kernel(
    table_ptr, norms_ptr, mean_ptr, square_ptr, steps_ptr, rows_ptr, gradient_ptr, x_ptr, radial_ptr,
    square_norms_ptr, rate1_ptr, rate2_ptr, factor_ptr, row_hash_ptr, column_hash_ptr,
    num_active, num_rows, batch, size, stride, lr, decay, epsilon,
    FACTORED: tl.constexpr, FIRST_MOMENT: tl.constexpr, BY_ELEMENT: tl.constexpr, DITHERS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """AdamW on BLOCK_R active rows, tile by tile; rows >= num_rows are padding and not touched.

    The gradient of the directions is gradient [a, b] times x [b, e] when FACTORED, else gradient [a, e].
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.load(rows_ptr + r, mask=r < num_active, other=num_rows)
    is_row = row < num_rows
    inverse = _inverse_norm(norms_ptr, row, is_row)
    radial = tl.load(radial_ptr + r, mask=is_row, other=0.0) * inverse
    inverse *= tl.load(factor_ptr)
    rate1, rate2 = tl.load(rate1_ptr + r, mask=is_row, other=0.0), tl.load(rate2_ptr + r, mask=is_row, other=0.0)
    tl.store(steps_ptr + row, tl.load(steps_ptr + row, mask=is_row, other=0) + 1, mask=is_row)
    row_root = tl.zeros((BLOCK_R,), tl.float32)
    row_hash = tl.zeros((BLOCK_R,), tl.int32)
    if not BY_ELEMENT:
        square = tl.load(square_ptr + row, mask=is_row, other=0.0)
        square = square * (1 - rate2) + tl.load(square_norms_ptr + r, mask=is_row, other=0.0) / size * rate2
        tl.store(square_ptr + row, square, mask=is_row)
        row_root = tl.sqrt(square)
    if DITHERS:
        row_hash = tl.load(row_hash_ptr + r, mask=is_row, other=0)
    square_norm = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, size, BLOCK_E):
        k = start + tl.arange(0, BLOCK_E)
        mask = is_row[:, None] & (k < size)[None, :]
        place = row[:, None] * size + k[None, :]
        # Asked for before the product, so that memory and tensor cores work at the same time.
        w = tl.load(table_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if FIRST_MOMENT:
            average = tl.load(mean_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if FACTORED:
            gradient = _row_gradient(gradient_ptr, x_ptr, r, k, is_row, batch, size, stride, BLOCK_R, BLOCK_B, BLOCK_E)
        else:
            gradient = tl.load(gradient_ptr + r.to(tl.int64)[:, None] * size + k[None, :], mask=mask, other=0.0)
        gradient = (gradient - radial[:, None] * w) * inverse[:, None]
        mean = gradient
        if FIRST_MOMENT:
            mean = average * (1 - rate1)[:, None] + gradient * rate1[:, None]
            tl.store(mean_ptr + place, mean.to(mean_ptr.dtype.element_ty), mask=mask)
        root = row_root[:, None]
        if BY_ELEMENT:
            squares = tl.load(square_ptr + place, mask=mask, other=0.0)
            squares = squares * (1 - rate2)[:, None] + gradient * gradient * rate2[:, None]
            tl.store(square_ptr + place, squares, mask=mask)
            root = tl.sqrt(squares)
        w = w * decay - lr * mean / (root + epsilon)
        column_hash = tl.zeros((BLOCK_E,), tl.int32)
        if DITHERS:
            column_hash = tl.load(column_hash_ptr + k, mask=k < size, other=0)
        w = _store_weights(table_ptr + place, w, row_hash, column_hash, mask, DITHERS)
        square_norm += tl.sum(tl.where(mask, w * w, 0.0), axis=1)
    tl.store(norms_ptr + row, tl.maximum(tl.sqrt(square_norm), 1e-12), mask=is_row)
