"""AdamW on some rows of a table: the other rows, their moments and their step counts are neither read nor written.

Bias correction counts the steps of each row by itself, so that a row's first update has full size whenever it comes.
When every row is active in every step this is exactly torch.optim.AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def row_sparse_adamw_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    *,
    rows: Tensor,
    gradient: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """Updates `rows` of a table in place.

    Args:
        weight: [c_local, e] fp32.
        exp_avg: [c_local, e] fp32, running mean of gradients.
        exp_avg_sq: [c_local, e] fp32, running mean of squared gradients.
        steps: [c_local] int32, updates that each row has had.
        rows: [a] int64, distinct row indices.
        gradient: [a, e] fp32, of those rows.
        lr: learning rate.
        beta1: decay of the running mean.
        beta2: decay of the running mean of squares.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled; a row shrinks by lr * weight_decay each time it is active.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2; we differ in that
    rows without a part in the step stand still (no decay, no momentum) and have their own step count.
    """
    if rows.numel() == 0:
        return
    count = steps[rows] + 1
    mean = exp_avg[rows].lerp_(gradient, 1 - beta1)
    square = exp_avg_sq[rows].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    correction1 = 1 - beta1 ** count.double()[:, None]
    correction2 = 1 - beta2 ** count.double()[:, None]
    steps[rows] = count
    exp_avg[rows] = mean
    exp_avg_sq[rows] = square
    denominator = square.sqrt_().div_(correction2.sqrt_().float()).add_(epsilon)
    update = mean.div_(denominator).mul_((lr / correction1).float())
    weight[rows] = weight[rows].mul_(1 - lr * weight_decay).sub_(update)
