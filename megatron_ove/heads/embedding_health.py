"""Signs of an encoder that has collapsed: embeddings that all point one way, or vary in few directions.

Shape letters: n embeddings, e embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_SAMPLES = 256
"""Embeddings that are looked at, the first ones: their products with one another cost n^2 e operations."""


@torch.no_grad()
def embedding_health(embeddings: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns figures of a microbatch's embeddings, name -> (figure * n, n): the larger microbatch counts more.

    "mean_cosine": mean cosine of two different ones: 1 = all point the same way.
    "effective_rank": participation ratio (tr C)^2 / tr(C^2) of their covariance C: in how many directions they vary as
    if equally strongly; 1 = along a line, n - 1 or e at the most, 0 = not at all.

    Waits for nothing. Fewer than two embeddings tell nothing and count nothing.

    Args:
        embeddings: [n, e] fp32, normalized.
    """
    x = embeddings.detach()[:MOST_SAMPLES]
    count = len(x)
    if count < 2:
        nothing = torch.zeros((), device=x.device)
        return {"mean_cosine": (nothing, nothing), "effective_rank": (nothing, nothing)}
    # sum over pairs of x_i . x_j = |sum of x|^2 - sum of |x_i|^2
    mean_cosine = (x.sum(dim=0).square().sum() - x.square().sum()) / (count * (count - 1))
    centred = x - x.mean(dim=0)
    # The non-zero eigenvalues of C and of the Gram matrix are the same but for a factor, which the ratio loses.
    gram = centred @ centred.T
    smallest = torch.finfo(torch.float32).tiny
    effective_rank = gram.trace().square() / gram.square().sum().clamp(min=smallest)
    weight = torch.full((), float(count), device=x.device)
    return {"mean_cosine": (mean_cosine * count, weight), "effective_rank": (effective_rank * count, weight)}
