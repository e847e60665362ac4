"""Linear maps on a CPU: oneDNN's matrix products also in fp32, and the bias in the same pass.

torch gives fp32 products to MKL, which on AMD processors runs at less than half of what the processor can do; oneDNN,
which torch uses for bf16, does not. Products are full fp32 either way. On a GPU these are torch's and megatron-core's
own linear maps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

# The operation torch's own compiler uses; absent where torch was built without oneDNN.
_ONEDNN_LINEAR: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x @ weight^T + bias, [..., o].

    Args:
        x: [..., i].
        weight: [o, i], of x's dtype.
        bias: [o].
    """
    if not _uses_onednn(x):
        return F.linear(x, weight, bias)
    result: Tensor = _OneDnnLinear.apply(x, weight, bias)
    return result


class LocalColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's; without tensor parallelism its product on a CPU is `linear`."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _product(super()._forward_impl, input, weight, *args, **kwargs)


class LocalRowParallelLinear(RowParallelLinear):
    """megatron-core's; its product on a CPU is `linear`."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _product(super()._forward_impl, input, weight, *args, **kwargs)


def _product(of_megatron: Any, input: Tensor, weight: Tensor, *, bias: Tensor | None, **options: Any) -> Tensor:
    communicates = options["allreduce_dgrad"] or options["sequence_parallel"]
    if input.device.type == "cpu" and not communicates:
        return linear(input, weight, bias)
    result: Tensor = of_megatron(input, weight, bias=bias, **options)
    return result


def _uses_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _ONEDNN_LINEAR is not None and x.numel() > 0


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        g_x = _multiply(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        g_weight = _multiply(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return g_x, g_weight, rows.sum(0) if ctx.has_bias else None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = _ONEDNN_LINEAR(_dense(x), _dense(weight), bias, "none", [], "")
    return product


def _dense(x: Tensor) -> Tensor:
    """oneDNN multiplies matrices with gaps between their rows a thousand times more slowly."""
    is_dense = x.is_contiguous() or (x.dim() == 2 and x.t().is_contiguous())
    return x if is_dense else x.contiguous()
