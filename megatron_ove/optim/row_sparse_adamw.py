"""AdamW on one chunk of rows of a table, with a step count per row; the rest of the table is not touched.

Moments are kept as bias-corrected running averages, m_t = m + (1 - b) / (1 - b^t) (g - m), which is what AdamW's m and
v become after their correction. t counts the row's own updates, so a row's first update has full size whenever it
comes. When every row is active in every step and moments are kept by element this is exactly torch.optim.AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def adamw_rows_(
    weight: Tensor,
    mean: Tensor | None,
    square: Tensor,
    count: Tensor,
    *,
    gradient: Tensor,
    gradient_square: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> Tensor:
    """Updates rows in place, in fp32.

    Args:
        weight: [r, e] fp32.
        mean: [r, e] fp32, corrected running average of gradients; None = the gradient itself is followed.
        square: corrected running average of squared gradients: [r, e] fp32 by element, or [r, 1] fp32 with one number
            for the whole row.
        count: [r] int32, updates of each row including this one.
        gradient: [r, e] fp32; overwritten.
        gradient_square: what enters `square`, of its shape: squares, or their mean over the row.
        lr: learning rate.
        beta1: decay of `mean`.
        beta2: decay of `square`.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled; a row shrinks by lr * weight_decay with each update.

    Returns:
        `weight`.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2. One second moment
    per row is the blockwise mean of Zhang et al., "Adam-mini", ICLR 2025, with a class center as the block.
    """
    average_(square, gradient_square, count, beta2)
    if mean is not None:
        gradient = average_(mean, gradient, count, beta1)
    weight.mul_(1 - lr * weight_decay)
    if square.shape == weight.shape:
        return weight.addcdiv_(gradient, square.sqrt().add_(epsilon), value=-lr)
    return weight.addcmul_(gradient, (square.sqrt() + epsilon).reciprocal_(), value=-lr)


def average_(average: Tensor, value: Tensor, count: Tensor, beta: float) -> Tensor:
    """Updates a bias-corrected running average in place and returns it.

    Args:
        average: [r, n] fp32; its contents do not matter where `count` is 1.
        value: [r, n] fp32, what is new.
        count: [r] int32, values so far, this one included.
        beta: decay.
    """
    return average.lerp_(value, ((1 - beta) / -torch.expm1(count.double()[:, None] * _log(beta))).float())


def _log(beta: float) -> float:
    """log(beta); -inf for 0, whose powers are then 0."""
    return float(torch.tensor(beta, dtype=torch.float64).log())
