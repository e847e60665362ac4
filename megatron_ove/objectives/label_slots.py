"""Which of a sample's stored labels a step uses: drawn without replacement, as a function of the sample's seed only."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ove.parallel.random import mix64

# Keeps this use of a sample's seed apart from augmentation, which draws from the same one.
_PURPOSE = 0x6C6162656C73  # "labels"
_LAST = torch.iinfo(torch.int64).max


def draw_label_slots(labels: Tensor, sample_seeds: Tensor, num_slots: int) -> Tensor:
    """Draws `num_slots` of each sample's stored labels.

    Columns are ordered by a hash of (seed, column), lowest first, those with -1 last. A class that is stored twice can
    be drawn twice.

    Args:
        labels: [b, L] integers, -1 = none.
        sample_seeds: [b] int64.
        num_slots: k.

    Returns:
        [b, k] int64; -1 where a sample has fewer labels.
    """
    num_samples, width = labels.shape
    labels = labels.to(torch.int64)
    columns = torch.arange(width, device=labels.device)
    order_key = mix64(sample_seeds[:, None], _PURPOSE, columns[None, :])
    order = order_key.masked_fill(labels < 0, _LAST).argsort(dim=1, stable=True)[:, :num_slots]
    drawn = labels.gather(1, order)
    if width >= num_slots:
        return drawn
    return torch.cat([drawn, drawn.new_full((num_samples, num_slots - width), -1)], dim=1)
