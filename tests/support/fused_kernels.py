"""Plain torch in the place of CUDA packages: the documented signatures, shapes and sums, and nothing more.

They show that layout, boundaries, padding, parameter names and gradients are handed over as those packages want them.
The packages themselves are compared in tests/gpu.
"""

from __future__ import annotations

import itertools
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_ove.model import encoder as encoder_module
from megatron_ove.model.kernels import EncoderKernels


def use_kernels(patch: pytest.MonkeyPatch, kernels: EncoderKernels) -> None:
    """Builds encoders from here on with these kernels, and puts stand-ins where their packages would be."""
    engine = "megatron.core.extensions.transformer_engine."
    patch.setattr(encoder_module, "resolve_kernels", lambda *args, **kwargs: kernels)
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    patch.setitem(__import__("sys").modules, "flash_attn", package)
    patch.setattr(engine + "fused_apply_rotary_pos_emb", fused_apply_rotary_pos_emb, raising=False)
    patch.setattr(engine + "TELayerNormColumnParallelLinear", LayerNormColumnParallelLinear)
    patch.setattr(engine + "TERowParallelLinear", RowParallelLinear)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """flash-attn 2's variable-length attention: q [total_q, n, d], k and v [total_k, n, d] -> [total_q, n, d]."""
    assert q.ndim == k.ndim == v.ndim == 3 and all(x.stride(-1) == 1 for x in (q, k, v))
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q.device == q.device
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    assert type(max_seqlen_q) is type(max_seqlen_k) is int  # a tensor would make the kernel's launch wait for the GPU
    assert not causal and dropout_p == 0 and not softcap and alibi_slopes is None and block_table is None
    bounds = list(itertools.pairwise(cu_seqlens_q.tolist()))
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
    # The kernel leaves rows beyond its tiles and outside of all sequences as they were in memory.
    rows = [q.new_full((bounds[0][0], *q.shape[1:]), torch.nan)] if bounds[0][0] else []
    scale = softmax_scale or q.shape[-1] ** -0.5
    for start, stop in bounds:
        stop = min(stop, start + max_seqlen_q)
        scores = torch.einsum("qnd,knd->nqk", q[start:stop].float(), k[start:stop].float()) * scale
        rows.append(torch.einsum("nqk,knd->qnd", scores.softmax(-1), v[start:stop].float()).to(q.dtype))
    missing = len(q) - sum(len(row) for row in rows)
    return torch.cat([*rows, q.new_full((missing, *q.shape[1:]), torch.nan)])


class _FusedRotation(torch.autograd.Function):
    """Transformer Engine's rotation with interleaved channels, `sbhd`, both passes as its kernel has them.

    Forward: x[c] cos(f[c]) + swap(x)[c] sin(f[c]), where swap takes (a, b) to (-b, a). Backward: g[c] cos(f[c]) plus,
    at even channels, g[c + 1] sin(f[c + 1]), at odd ones -g[c - 1] sin(f[c - 1]).
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, freqs: Tensor) -> Tensor:
        ctx.save_for_backward(freqs)
        even, odd = t.float()[..., ::2], t.float()[..., 1::2]
        swapped = torch.stack([-odd, even], dim=-1).flatten(-2)
        return (t.float() * freqs.cos() + swapped * freqs.sin()).to(t.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (freqs,) = ctx.saved_tensors
        weighted = grad.float() * freqs.sin()
        partner = torch.stack([weighted[..., 1::2], -weighted[..., ::2]], dim=-1).flatten(-2)
        return (grad.float() * freqs.cos() + partner).to(grad.dtype), None


def fused_apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False
) -> Tensor:
    """megatron-core's door to Transformer Engine's rotation: t [s, b, n, d], freqs [s, 1, 1, d] fp32."""
    assert t.ndim == 4 and freqs.shape == (t.shape[0], 1, 1, t.shape[3]) and freqs.dtype == torch.float32
    assert interleaved and not transpose_output_memory
    return _FusedRotation.apply(t, freqs)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """Names, shapes and sums of megatron-core's TELayerNormColumnParallelLinear: a norm, then the linear map."""

    def __init__(self, input_size: int, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, *args, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_bias = torch.nn.Parameter(torch.zeros(input_size, dtype=config.params_dtype))
        self.epsilon = config.layernorm_epsilon

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.epsilon)
        return super().forward(normed, *args, **kwargs)
