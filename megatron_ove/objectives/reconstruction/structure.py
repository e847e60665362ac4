"""Structure-aware distance of pictures: where their edges are, and how far every pixel is from one.

Source: MonkeyOCRv2 (2026): an edge map is sigmoid((Sobel magnitude - its mean) / tau); a distance map starts at
T (1 - edge) and is refined by T rounds of min(D, minpool3x3(D) + 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
_TINY = 1e-12
"""Below the square of a gradient, so that the root has a derivative where a picture is even."""


def soft_edges(pictures: Tensor, temperature: float) -> Tensor:
    """Returns [n, 1, H, W] in 0 .. 1 of pictures [n, 3, H, W] in 0 .. 1; the mean of their channels is looked at."""
    gray = F.pad(pictures.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor(_SOBEL, dtype=gray.dtype, device=gray.device)
    gradients = F.conv2d(gray, torch.stack([kernel, kernel.t()]).unsqueeze(1))  # [n, 2, H, W]
    magnitude = (gradients.square().sum(dim=1, keepdim=True) + _TINY).sqrt()
    return torch.sigmoid((magnitude - magnitude.mean(dim=(2, 3), keepdim=True)) / temperature)


def edge_distances(edges: Tensor, reach: int) -> Tensor:
    """Returns [n, 1, H, W], about how many pixels every pixel is from an edge, at most `reach`."""
    distances = reach * (1 - edges)
    for _ in range(reach):
        distances = torch.minimum(distances, 1 - F.max_pool2d(-distances, 3, stride=1, padding=1))
    return distances


def structure_distance(said: Tensor, wanted: Tensor, *, edge_weight: float, temperature: float, reach: int) -> Tensor:
    """Returns [n], L1 between distance maps plus `edge_weight` times L1 between edge maps, means over pixels.

    Args:
        said, wanted: [n, 3, H, W] in 0 .. 1.
        edge_weight, temperature, reach: as in the configuration.
    """
    edges = [soft_edges(pictures, temperature) for pictures in (said, wanted)]
    maps = [edge_distances(one, reach) for one in edges]
    return (maps[0] - maps[1]).abs().mean(dim=(1, 2, 3)) + edge_weight * (edges[0] - edges[1]).abs().mean(dim=(1, 2, 3))
