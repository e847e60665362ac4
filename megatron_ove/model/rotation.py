"""How queries and keys are turned: by torch's operations, by the same compiled, or by Transformer Engine's kernel.

All three compute `rotary.rotate`. Transformer Engine's kernel is exact for the mixed layout in which channel pairs
(2i, 2i + 1) turn by different angles: with `interleaved` it reads one angle per channel, forms
x[c] * cos(angle[c]) + swap(x)[c] * sin(angle[c]), and its backward pass takes the partner's sine. Its `thd` form would
restart the angles at every sample; so the pack goes in as one sequence of P tokens in `sbhd` form, with its own angles.
It computes cosines and products in fp32, while the tables here are rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from megatron_ove.model.attention import PatchSegments, rotate_by_tables
from megatron_ove.model.kernels import RotationKind
from megatron_ove.model.rotary import rotate

Rotation = Callable[[Tensor, PatchSegments], Tensor]
"""([P, n, d], segments) -> [P, n, d]."""


def rotation_of(kind: RotationKind) -> Rotation:
    """Returns the function that turns queries and keys."""
    return {"torch": rotate_by_tables, "compiled": _rotate_compiled, "transformer_engine": _rotate_fused}[kind]


def _rotate_compiled(x: Tensor, segments: PatchSegments) -> Tensor:
    return _compiled()(x, segments.cos, segments.sin)


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # One program for all numbers of tokens: budgets are fixed, but evaluation packs as it comes.
    return torch.compile(rotate, dynamic=True)


def _rotate_fused(x: Tensor, segments: PatchSegments) -> Tensor:
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb

    angles = segments.angles[:, None, None]  # [P, 1, 1, d]
    return fused_apply_rotary_pos_emb(x.unsqueeze(1), angles, interleaved=True).squeeze(1)
