"""3-D rotary positions with the OneVision-Encoder's mixed layout. Parameter-free, nothing in the state dict.

Surprising and kept for weight parity: the angle table repeats its first half, while the rotation pairs neighbouring
channels, so the two members of a pair turn by different angles, and norms are not kept: it is not a rotation matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Share of the rotary channels for (time, height, width), in sixteenths of half the head dim.
_AXIS_SHARES = (4, 6, 6)
# An integer that holds two channels.
_WORDS = {torch.bfloat16: torch.int32, torch.float32: torch.int64}


def inverse_frequencies(head_dim: int, theta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the frequencies of time, height and width: fp32 [head_dim / 8], [3 head_dim / 16] twice.

    Each axis runs over its own exponents: theta^(-i / n_axis) for i = 0..n_axis - 1.

    Source: OneVision-Encoder, VideoRotaryEmbeddingSplit466.
    """
    unit = head_dim // 2 // 16
    sizes = [share * unit for share in _AXIS_SHARES]
    time, height, width = (theta ** -(torch.arange(n, dtype=torch.float32) / n) for n in sizes)
    return time, height, width


def rotary_angles(positions: Tensor, frequencies: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Returns fp32 [P, d] angles of integer grid positions; the second half of the channels repeats the first.

    Args:
        positions: [P, 3] int32, (t, h, w).
        frequencies: of `inverse_frequencies`, on the same device.
    """
    per_axis = [positions[:, axis, None].float() * inverse for axis, inverse in enumerate(frequencies)]
    angles = torch.cat(per_axis, dim=-1)  # [P, d/2]
    return torch.cat([angles, angles], dim=-1)  # [P, d]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotation: x * cos + swap(x) * sin, where swap sends channel pairs (a, b) to (-b, a).

    Args:
        x: [P, n, d].
        cos, sin: [P, 1, d], of the angles, in x's dtype; no gradient flows to them.
    """
    rotated: Tensor = _Rotate.apply(x, cos, sin)
    return rotated


class _Rotate(torch.autograd.Function):
    """Keeps nothing but the tables for the backward pass, which is the same map with the partners' sines."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        signed = sin.clone()
        signed[..., 0::2].neg_()
        ctx.save_for_backward(cos, signed)
        return (x * cos).add_(_swap_pairs(x).mul_(signed))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, signed = ctx.saved_tensors
        return (gradient * cos).add_(_swap_pairs(gradient).mul_(_swap_pairs(signed))), None, None


def _swap_pairs(x: Tensor) -> Tensor:
    """Returns a copy of [..., d] with neighbouring channels exchanged, (a, b) -> (b, a)."""
    word = _WORDS.get(x.dtype)
    if x.device.type != "cpu" or word is None:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    # A pair is one integer here, and its halves change places in a few vectorized passes; a flip moves single elements.
    half = 8 * x.element_size()
    pairs = (x if x.stride(-1) == 1 else x.contiguous()).view(word)
    swapped = (pairs >> half).bitwise_and_((1 << half) - 1)
    return swapped.bitwise_or_(pairs << half).view(x.dtype)
