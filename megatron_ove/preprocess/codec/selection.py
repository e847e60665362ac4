"""Scores -> the patches kept: the first frame whole, then the best of all later frames together, within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ove.preprocess.codec.clip_frames import ClipFrames, read_clip
from megatron_ove.preprocess.codec.saliency import patch_scores
from megatron_ove.preprocess.codec.settings import CodecSettings


@dataclass(frozen=True)
class SelectedClip:
    """A clip's grid frames and the patches kept of them.

    Attributes:
        clip: the grid frames.
        positions: [k, 3] int32 (t, h, w), sorted by t, then h, then w; k <= patch_budget.
        scores: [num_frames, grid_height, grid_width] float32 in 0..1.
    """

    clip: ClipFrames
    positions: np.ndarray
    scores: np.ndarray


def select_clip(path: str | Path, settings: CodecSettings) -> SelectedClip:
    """Reads a clip and selects its patches; raises `DataError` as `read_clip` does."""
    clip = read_clip(path, settings)
    scores = patch_scores(clip.frames, settings, clip.content_box)
    positions = select_patches(scores, settings, content_box=clip.content_box, is_duplicate=clip.is_duplicate)
    return SelectedClip(clip=clip, positions=positions, scores=scores)


def select_patches(
    scores: np.ndarray,
    settings: CodecSettings,
    *,
    content_box: tuple[int, int, int, int] | None = None,
    is_duplicate: np.ndarray | None = None,
) -> np.ndarray:
    """Chooses patches by score.

    Args:
        scores: [t, grid_height, grid_width] float32.
        settings: budget, minimum score and per-frame cap.
        content_box: (top, left, height, width) in pixels; patches not wholly inside are never kept.
        is_duplicate: [t] bool; a repeated frame is never kept.

    Returns:
        [k, 3] int32 (t, h, w) sorted; ties go to the earlier patch, so the result is a function of the scores alone.
    """
    num_frames, rows, columns = scores.shape
    allowed = np.broadcast_to(_inside(content_box, rows, columns, settings.patch_size), scores.shape).copy()
    if is_duplicate is not None:
        allowed[is_duplicate] = False
    first = np.argwhere(allowed[:1])
    candidates = np.where(allowed & (scores >= settings.min_score), scores, -1.0).reshape(num_frames, -1)
    candidates[0] = -1.0
    cap = int(rows * columns * settings.max_frame_share)
    ranked = np.argsort(-candidates, axis=1, kind="stable")
    np.put_along_axis(candidates, ranked[:, cap:], -1.0, axis=1)
    best = np.argsort(-candidates, axis=None, kind="stable")[: max(settings.patch_budget - len(first), 0)]
    best = best[candidates.reshape(-1)[best] >= 0.0]
    later = np.stack(np.unravel_index(np.sort(best), scores.shape), axis=1)
    return np.concatenate([first, later]).astype(np.int32)


def _inside(box: tuple[int, int, int, int] | None, rows: int, columns: int, patch_size: int) -> np.ndarray:
    """Returns [rows, columns] bool: True for patches wholly inside the content box."""
    if box is None:
        return np.ones((rows, columns), bool)
    top, left = np.arange(rows) * patch_size, np.arange(columns) * patch_size
    row_inside = (top >= box[0]) & (top + patch_size <= box[0] + box[2])
    column_inside = (left >= box[1]) & (left + patch_size <= box[1] + box[3])
    return row_inside[:, None] & column_inside[None, :]
