"""Attention in bf16 on a CPU with few cores: one head at a time, as matrix products that oneDNN does at full speed.

torch's own flash attention for CPUs reaches half of that speed, but shares its work out over many cores, which products
as small as these cannot. Scores are made for a block of queries at a time and made again in the backward pass, so
memory grows with the length of a sample and not with its square. Scores are rounded to bf16 before the softmax, as in
the published encoder's eager attention; torch's kernel keeps them in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries of a block: its scores against a thousand keys stay in the second-level cache.
_BLOCK = 512
# Below this the products are too small to be worth a call each.
_SHORTEST = 256
# With more, torch's kernel is the faster one.
_MOST_THREADS = 4


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Returns softmax(query @ key^T * scale) @ value, [count, n, S, d].

    Args:
        query, key, value: [count, n, S, d].
        scale: None = d^-0.5.
    """
    is_cpu_bf16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not is_cpu_bf16 or query.shape[2] < _SHORTEST or torch.get_num_threads() > _MOST_THREADS:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    attended: Tensor = _HeadByHead.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return attended


class _HeadByHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = ((query * scale).contiguous(), key.contiguous(), value.contiguous())
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        attended = _empty(query)
        for head in _heads(query):
            for rows in _blocks(query):
                weights = torch.softmax(query[head][rows] @ key[head].t(), dim=-1)
                attended[head][rows] = weights @ value[head]
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        gradient = gradient.contiguous()
        g_query, g_key, g_value = _empty(query), _empty(key), _empty(value)
        for head in _heads(query):
            sums = torch.zeros(2, *key.shape[2:], dtype=torch.float32)  # of the blocks, for key and value
            for rows in _blocks(query):
                q, g = query[head][rows], gradient[head][rows]
                weights = torch.softmax(q @ key[head].t(), dim=-1)
                g_weights = g @ value[head].t()
                g_scores = torch._softmax_backward_data(g_weights, weights, -1, weights.dtype)
                g_query[head][rows] = g_scores @ key[head]
                sums[0] += g_scores.t() @ q
                sums[1] += weights.t() @ g
            g_key[head], g_value[head] = sums
        return g_query * ctx.scale, g_key, g_value, None


def _empty(x: Tensor) -> Tensor:
    """Returns room for [count, n, S, d] whose memory is in the order of the pack, count, S, n, d."""
    count, heads, length, width = x.shape
    return x.new_empty(count, length, heads, width).transpose(1, 2)


def _heads(x: Tensor) -> Iterator[tuple[int, int]]:
    return ((sample, head) for sample in range(x.shape[0]) for head in range(x.shape[1]))


def _blocks(x: Tensor) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, x.shape[2], _BLOCK))
