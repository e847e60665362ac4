"""Exported (HuggingFace) encoders as encoders of batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.errors import ConfigError
from megatron_ove.evaluation.embedding import EncoderCallable
from megatron_ove.model.patch_embed import CLIP_MEAN, CLIP_STD
from megatron_ove.outputs import mean_of_segments


def load_exported_model(folder: str | Path) -> Any:
    """Loads an exported encoder in fp32, ready for evaluation; no code of the folder runs.

    Raises:
        ConfigError: the folder holds no exported model, or a damaged one.
    """
    from megatron_ove.hf_model.folder import load_onevision_model

    return _load(folder, load_onevision_model)


def load_exported_reader(folder: str | Path) -> Any:
    """Loads an exported reader in fp32, ready for evaluation; no code of the folder runs.

    Raises:
        ConfigError: the folder holds no exported reader, or a damaged one.
    """
    from megatron_ove.hf_model.folder import load_reader_model

    return _load(folder, load_reader_model)


def _load(folder: str | Path, load: Callable[[str | Path], Any]) -> Any:
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(
            f"{folder} is not an exported model, because it holds no config.json; make one with "
            "megatron-ove convert export"
        )
    try:
        return load(folder)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ConfigError(
            f"{folder} cannot be loaded as an exported model ({reason}); give a folder that megatron-ove convert "
            "export made, or make it again"
        ) from error


def huggingface_encoder(model: Any, patch_size: int) -> EncoderCallable:
    """Makes an exported model (or any with its calling form) an encoder of batches.

    A sample's patches are laid side by side into a picture one patch high; `patch_positions` tells the model where each
    belongs, so one form serves images, pages and clips.

    Args:
        model: takes pixel_values [1, 3, p, n * p] and patch_positions [1, n, 3]; returns an object with pooler_output.
        patch_size: side of a patch in pixels.
    """

    @torch.inference_mode()
    def encode(batch: Batch) -> Tensor:
        pack = batch.main
        assert pack.patches is not None
        bounds = pack.cu_seqlens.tolist()
        pooled = []
        for start, stop in pairwise(bounds):
            patches = normalize_pixels(pack.patches[start:stop].view(-1, 3, patch_size, patch_size))  # [n, 3, p, p]
            strip = patches.permute(1, 2, 0, 3).reshape(1, 3, patch_size, -1)  # [1, 3, p, n * p]
            output = model(pixel_values=strip, patch_positions=pack.positions[None, start:stop].long())
            pooled.append(output.pooler_output)
        return mean_of_segments(torch.cat(pooled), pack.sample, batch.num_samples)

    return encode


def normalize_pixels(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, height, width] -> fp32 with CLIP's mean and standard deviation, as encoders are trained."""
    mean = torch.tensor(CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255.0 - mean) / std
