"""Energy of every patch: how much of it the frame before, moved with the camera, does not explain.

energy = weighted mean of (a) motion left after taking out the camera's, and (b) |luma - motion-compensated luma of the
frame before|. Each is divided by its own 95th percentile within the frame, with a floor, so that quiet frames are not
amplified. A motion vector counts only where the camera-compensated difference is real: encoders give flat walls random
vectors. Source: the idea of the OneVision-Encoder paper (arXiv 2602.08683); the re-encoded chain, the affine camera and
the gate are ours.
"""

from __future__ import annotations

import cv2
import numpy as np

from megatron_ove.preprocess.codec.motion_chain import VECTOR_CELL, decode_chain, encode_chain
from megatron_ove.preprocess.codec.settings import CodecSettings

_GATE_WINDOW = 16  # pixels: one macroblock
_CAMERA_ITERATIONS = 4
_MIN_CAMERA_CELLS = 8


def patch_scores(
    frames: np.ndarray, settings: CodecSettings, content_box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Scores every patch of a clip's grid frames.

    Args:
        frames: [t, height, width, 3] uint8 RGB.
        settings: grid and constants.
        content_box: (top, left, height, width) of the picture inside the frame; statistics ignore what is outside.

    Returns:
        [t, grid_height, grid_width] float32 in 0..1; the first frame, which nothing predicts, is all 0.
    """
    num_frames, height, width = frames.shape[:3]
    box = content_box or (0, 0, height, width)
    energy = np.zeros((num_frames, height, width), np.float32)
    previous: np.ndarray | None = None
    for index, (luma, field) in enumerate(decode_chain(encode_chain(frames, settings))):
        if previous is not None:
            energy[index] = _frame_energy(luma, previous, field, box, settings)
        previous = luma
    patch = settings.patch_size
    cells = energy.reshape(num_frames, height // patch, patch, width // patch, patch)
    return cells.mean(axis=(2, 4), dtype=np.float32)


def _frame_energy(
    luma: np.ndarray,
    previous: np.ndarray,
    field: np.ndarray,
    box: tuple[int, int, int, int],
    settings: CodecSettings,
) -> np.ndarray:
    """Returns the energy [height, width] float32 of one frame; 0 outside `box`."""
    height, width = luma.shape
    content = (slice(box[0], box[0] + box[2]), slice(box[1], box[1] + box[3]))
    is_intra = _to_pixels(np.isnan(field[..., 0]), height, width)
    camera = fit_camera(field, box)
    own = np.hypot(*np.moveaxis(np.nan_to_num(field - camera), -1, 0))
    motion = _to_pixels(own, height, width)
    compensated = _predict(previous, np.nan_to_num(field), luma.shape)
    residual = np.maximum(cv2.absdiff(luma, compensated).astype(np.float32) - settings.noise_level, 0.0)
    unexplained = cv2.absdiff(luma, _predict(previous, camera, luma.shape)).astype(np.float32)
    gate = np.clip(cv2.blur(unexplained, (_GATE_WINDOW, _GATE_WINDOW)) / settings.gate_level, 0.0, 1.0)

    full_motion = max(float(np.percentile(motion[content], settings.percentile)), settings.motion_floor)
    full_residual = max(float(np.percentile(residual[content], settings.percentile)), settings.residual_floor)
    motion = np.where(is_intra, 1.0, np.clip(motion / full_motion, 0.0, 1.0)) * gate  # intra: prediction gave up
    residual = np.clip(residual / full_residual, 0.0, 1.0)
    total = settings.motion_weight + settings.residual_weight
    energy = np.zeros((height, width), np.float32)
    energy[content] = ((settings.motion_weight * motion + settings.residual_weight * residual) / total)[content]
    return energy


def fit_camera(field: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Fits one affine motion (pan, zoom, rotation, shear) to a motion field, robustly.

    Reweighted least squares with a Geman-McClure weight whose width follows the median error, so that moving objects do
    not pull the camera.

    Args:
        field: [rows, columns, 2] float32, NaN = no vector.
        box: content box in pixels; cells outside are ignored.

    Returns:
        [rows, columns, 2] float32: the camera's motion at every cell; zeros when there are too few vectors.
    """
    rows, columns = field.shape[:2]
    row, column = np.mgrid[0:rows, 0:columns].astype(np.float32)
    design = np.stack([np.ones_like(row), column / columns - 0.5, row / rows - 0.5], axis=-1)
    centre_y, centre_x = (row + 0.5) * VECTOR_CELL, (column + 0.5) * VECTOR_CELL
    inside = (centre_y >= box[0]) & (centre_y < box[0] + box[2]) & (centre_x >= box[1]) & (centre_x < box[1] + box[3])
    known = inside & ~np.isnan(field[..., 0])
    if known.sum() < _MIN_CAMERA_CELLS:
        return np.zeros_like(field)
    matrix, motion = design[known].astype(np.float64), field[known].astype(np.float64)
    predicted = np.broadcast_to(np.median(motion, axis=0), motion.shape)
    parameters = np.zeros((3, 2))
    for _ in range(_CAMERA_ITERATIONS):
        error = np.hypot(*(motion - predicted).T)
        width = max(1.4826 * float(np.median(error)), 0.25)
        weight = 1.0 / (1.0 + (error / (2.0 * width)) ** 2) ** 2
        weighted = matrix * weight[:, None]
        parameters = np.linalg.solve(weighted.T @ matrix + 1e-3 * np.eye(3), weighted.T @ motion)
        predicted = matrix @ parameters
    return (design @ parameters.astype(np.float32)).astype(np.float32)


def _to_pixels(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """[rows, columns] per 4 x 4 cell -> [height, width] per pixel."""
    return cells.repeat(VECTOR_CELL, axis=0).repeat(VECTOR_CELL, axis=1)[:height, :width]


def _predict(previous: np.ndarray, field: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Moves `previous` [height, width] uint8 by a cell field [rows, columns, 2]."""
    height, width = shape
    from_x = _to_pixels(field[..., 0], height, width) + np.arange(width, dtype=np.float32)[None, :]
    from_y = _to_pixels(field[..., 1], height, width) + np.arange(height, dtype=np.float32)[:, None]
    return cv2.remap(previous, from_x, from_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
