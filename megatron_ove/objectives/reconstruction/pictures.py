"""Patches as pictures and back, and at another size, on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def to_pictures(patches: Tensor, count: int, rows: int, columns: int) -> Tensor:
    """Returns [count, 3, rows * p, columns * p] of patches [count * rows * columns, 3 * p * p] in row-major order."""
    side = round((patches.shape[1] // 3) ** 0.5)
    grid = patches.view(count, rows, columns, 3, side, side)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, rows * side, columns * side)


def to_patches(pictures: Tensor, side: int) -> Tensor:
    """Returns [count * rows * columns, 3 * side * side] of pictures [count, 3, rows * side, columns * side]."""
    count, _, height, width = pictures.shape
    grid = pictures.view(count, 3, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * side * side)


def scale_patches(patches: Tensor, count: int, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Returns uint8 patches of pictures that are scaled to another grid, bicubic with antialiasing.

    Args:
        patches: [count * rows * columns, 3 * p * p] uint8.
        count: pictures.
        grid: (rows, columns).
        target: (rows, columns) wanted.
    """
    side = round((patches.shape[1] // 3) ** 0.5)
    pictures = to_pictures(patches, count, *grid).float()
    size = (target[0] * side, target[1] * side)
    scaled = F.interpolate(pictures, size=size, mode="bicubic", antialias=True, align_corners=False)
    return to_patches(scaled.round_().clamp_(0, 255).to(torch.uint8), side)


def resample_features(features: Tensor, count: int, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Returns [count * rows * columns, e] fp32 features at the patches of another grid, bilinear.

    Args:
        features: [count * rows * columns, e] of `grid`.
        count: pictures.
        grid: (rows, columns).
        target: (rows, columns) wanted.
    """
    planes = features.float().view(count, *grid, -1).permute(0, 3, 1, 2)
    wanted = F.interpolate(planes, size=target, mode="bilinear", align_corners=False)
    return wanted.permute(0, 2, 3, 1).flatten(0, 2)
