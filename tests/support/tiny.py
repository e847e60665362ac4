"""Tiny encoders and batches: every kind of sample, a few patches each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack, Samples
from megatron_ove.config.encoder import EncoderConfig

PATCH_SIZE = 4
# A sample is its patches, [S, 3 * p * p] uint8, and their positions, [S, 3] int32.
Sample = tuple[Tensor, Tensor]


def tiny_encoder_config(**changes: Any) -> EncoderConfig:
    """An encoder with all parts of the large one, small enough for a test."""
    values = {
        "hidden_size": 64,
        "num_layers": 4,
        "num_attention_heads": 2,
        "ffn_hidden_size": 96,
        "patch_size": PATCH_SIZE,
        "layer_spec": "local",
    }
    return EncoderConfig(**{**values, **changes})


def random_patches(num_patches: int, *, seed: int, patch_size: int = PATCH_SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_patches, 3 * patch_size**2), generator=generator, dtype=torch.uint8)


def grid_positions(times: Sequence[int], height: int, width: int) -> Tensor:
    """[len(times) * height * width, 3] int32, row-major."""
    axes = (torch.tensor(list(times)), torch.arange(height), torch.arange(width))
    return torch.cartesian_prod(*axes).view(-1, 3).to(torch.int32)


def image_sample(height: int, width: int, *, seed: int = 0, patch_size: int = PATCH_SIZE) -> Sample:
    """An image of height x width patches at t = 0."""
    return random_patches(height * width, seed=seed, patch_size=patch_size), grid_positions([0], height, width)


def codec_clip_sample(num_patches: int, height: int, width: int, *, seed: int = 0) -> Sample:
    """`num_patches` patches scattered over the 64-frame grid, in (t, h, w) order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(64 * height * width, generator=generator)[:num_patches].sort().values
    return random_patches(num_patches, seed=seed), grid_positions(range(64), height, width)[chosen]


def sampled_frames_sample(num_frames: int, height: int, width: int, *, seed: int = 0) -> Sample:
    """Whole frames, evenly spread over the 64-frame grid."""
    times = [round(index * 63 / (num_frames - 1)) for index in range(num_frames)]
    return random_patches(num_frames * height * width, seed=seed), grid_positions(times, height, width)


def collage_sample(num_frames: int, height: int, width: int, *, seed: int = 0) -> Sample:
    """Frames stacked into one picture: t = 0 and h = 16 * frame + row."""
    positions = grid_positions(range(num_frames), height, width)
    positions[:, 1] += 16 * positions[:, 0]
    positions[:, 0] = 0
    return random_patches(num_frames * height * width, seed=seed), positions


def mixed_samples() -> list[Sample]:
    """One of each kind, odd sizes, two of equal length side by side."""
    return [
        image_sample(3, 5, seed=1),
        image_sample(5, 3, seed=2),
        codec_clip_sample(11, 4, 3, seed=3),
        sampled_frames_sample(3, 2, 3, seed=4),
        image_sample(1, 1, seed=5),
        collage_sample(2, 3, 2, seed=6),
    ]


def make_pack(samples: Sequence[Sample], *, num_patches: int | None = None, patch_size: int = PATCH_SIZE) -> PatchPack:
    """Packs samples.

    Args:
        samples: in order; may be empty.
        num_patches: P, padding included; None = no padding.
        patch_size: side of a patch.
    """
    lengths = [len(positions) for _, positions in samples]
    total = num_patches if num_patches is not None else sum(lengths)
    if sum(lengths) > total:
        raise ValueError(f"{sum(lengths)} patches do not fit into {total}")
    patches = torch.zeros(total, 3 * patch_size**2, dtype=torch.uint8)
    positions = torch.zeros(total, 3, dtype=torch.int32)
    if samples:
        patches[: sum(lengths)] = torch.cat([sample[0] for sample in samples])
        positions[: sum(lengths)] = torch.cat([sample[1] for sample in samples])
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PatchPack.of_whole_samples(positions, cu_seqlens, patches)


def make_batch(samples: Sequence[Sample], *, num_patches: int | None = None, first_key: int = 0) -> Batch:
    """Packs samples of one source into a microbatch; keys and seeds count up from `first_key`."""
    numbers = range(first_key, first_key + len(samples))
    keys, seeds = tuple(f"sample{number}" for number in numbers), torch.tensor(list(numbers), dtype=torch.int64)
    pack = make_pack(samples, num_patches=num_patches)
    return Batch({MAIN_PACK: pack}, Samples.of_one_source("images", keys, seeds))
