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
    """Half the passes over memory that autograd would take; only the tables are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        rotated = x * cos
        rotated[..., 0::2] -= x[..., 1::2] * sin[..., 0::2]
        rotated[..., 1::2] += x[..., 0::2] * sin[..., 1::2]
        return rotated

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # The transposed map: a channel gets its partner's gradient times the partner's sine.
        cos, sin = ctx.saved_tensors
        g_x = gradient * cos
        g_x[..., 0::2] += gradient[..., 1::2] * sin[..., 1::2]
        g_x[..., 1::2] -= gradient[..., 0::2] * sin[..., 0::2]
        return g_x, None, None
