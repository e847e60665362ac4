"""What the GPU benchmark runs: configurations, packs of samples, and a training step on them.

The step is the encoder's part of a run's: the same wrapped model, forward and backward pass, gradient norm, clipping
and AdamW with fp32 master weights. In the place of class-center heads, which have a benchmark of their own, stands a
softmax over fixed directions, one for each class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack, Samples
from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.train import TrainConfig
from megatron_ove.config.yaml_file import parse_yaml
from megatron_ove.optim.optimizer import build_dense_optimizer
from megatron_ove.outputs import VisionFeatures
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.planning.workload import Workload
from megatron_ove.training.build_model import build_model_chunks, model_of, parameter_names, weight_dtype

_BASE_CONFIGS = Path(__file__).resolve().parents[2] / "examples/_base"
_TINY = {"hidden_size": 128, "num_layers": 3, "num_attention_heads": 2, "ffn_hidden_size": 256}  # also for FP8
_SOURCE = "samples"
_LOGIT_SCALE = 16.0
SIZES = ("base", "large", "huge")


@dataclass(frozen=True)
class Pack:
    """Samples of one microbatch.

    Attributes:
        name: for tables.
        lengths: tokens of each sample.
        num_tokens: P, padding included.
    """

    name: str
    lengths: tuple[int, ...]
    num_tokens: int


_PACKS = (
    Pack("224 px", (256,) * 64, 16384),
    Pack("448 px", (1024,) * 16, 16384),
    # Clips of 2,048 patches with pictures and pages of other sizes between them.
    Pack("packed clips", (2048, 1024, 256, 256) * 4 + (256,) * 4 + (531, 307, 171), 16384),
)
_TINY_PACKS = (
    Pack("224 px", (16,) * 8, 128),
    Pack("448 px", (64,) * 2, 128),
    Pack("packed clips", (48, 32, 13, 9), 128),
)


def packs(*, tiny: bool) -> tuple[Pack, ...]:
    """Returns the packs that speed is measured on."""
    return _TINY_PACKS if tiny else _PACKS


def encoder_section(size: str, *, tiny: bool) -> dict[str, Any]:
    """Returns the encoder's settings of a published size, or of a toy in its place."""
    if tiny:
        return dict(_TINY)
    path = _BASE_CONFIGS / f"encoder_{size}.yaml"
    return dict(parse_yaml(path.read_text(encoding="utf-8"), str(path))["encoder"])


def bench_config(encoder: dict[str, Any], *, num_tokens: int, precision: str = "bf16", lr: float = 1e-4) -> TrainConfig:
    """Returns a whole configuration around an encoder; its source is never opened.

    Raises:
        ConfigError: the encoder cannot take this number of tokens in its precision.
    """
    patch = encoder.get("patch_size", 14)
    return config_from_dict(
        {
            "name": "gpu_benchmark",
            "run_dir": "runs/gpu",
            "encoder": encoder,
            "data": {
                "sources": {_SOURCE: {"kind": "image", "path": "unused", "image_size": patch}},
                "tokens_per_microbatch": num_tokens,
            },
            "objectives": {"classes": {"kind": "partial_fc", "source": _SOURCE, "num_classes": 1000}},
            "optim": {"lr": lr},
            "train": {"num_steps": 1, "global_batch_size": 1, "precision": precision},
        },
        "gpu_benchmark",
    )


def workload_of_pack(pack: Pack) -> Workload:
    """Describes one step of one microbatch to the planner."""
    lengths = np.array(pack.lengths, dtype=np.int64)

    def one(value: int) -> np.ndarray:
        return np.array([[value]], dtype=np.int64)

    squares = int((lengths**2).sum())
    return Workload(
        num_microbatches=1,
        tokens_per_microbatch=pack.num_tokens,
        sample_counts={_SOURCE: one(len(lengths))},
        real_tokens=one(int(lengths.sum())),
        sample_squares=one(squares),
        squared_lengths=one(squares),
    )


def make_batch(patches: Tensor, lengths: tuple[int, ...], num_tokens: int) -> Batch:
    """Packs samples on a square grid each.

    Args:
        patches: [sum(lengths), 3 * p * p] uint8.
        lengths: patches of each sample.
        num_tokens: P, padding included.
    """
    padding = num_tokens - len(patches)
    places = torch.cat([torch.arange(length) for length in lengths])
    sides = torch.cat([torch.full((length,), max(1, int(length**0.5))) for length in lengths])
    positions = torch.stack([torch.zeros_like(places), places // sides, places % sides], dim=1).to(torch.int32)
    pack = PatchPack.of_whole_samples(
        positions=F.pad(positions, (0, 0, 0, padding)),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        patches=F.pad(patches, (0, 0, 0, padding)),
    )
    keys = tuple(f"sample{index}" for index in range(len(lengths)))
    return Batch({MAIN_PACK: pack}, Samples.of_one_source(_SOURCE, keys, torch.arange(len(lengths))))


class LearnableSamples:
    """Pictures whose class can be learned: each class has one picture, seen through strong noise."""

    def __init__(self, *, num_classes: int, batch_size: int, patches_per_sample: int, patch_size: int) -> None:
        self._batch_size, self._length = batch_size, patches_per_sample
        generator = torch.Generator().manual_seed(0)
        shape = (num_classes, patches_per_sample, 3 * patch_size**2)
        self._pictures = 128 + 24 * torch.randn(shape, generator=generator)

    def __call__(self, step: int) -> tuple[Batch, Tensor]:
        """Returns the microbatch of a step, the same in every run, and its classes [b]."""
        generator = torch.Generator().manual_seed(1000 + step)
        classes = torch.randint(len(self._pictures), (self._batch_size,), generator=generator)
        noise = 48 * torch.randn(self._pictures[classes].shape, generator=generator)
        pictures = (self._pictures[classes] + noise).clamp(0, 255).to(torch.uint8)
        lengths = (self._length,) * self._batch_size
        return make_batch(pictures.flatten(0, 1), lengths, self._length * self._batch_size), classes


def random_samples(pack: Pack, patch_size: int) -> tuple[Batch, Tensor]:
    """Returns a microbatch of noise, for timing, and classes [b] for it."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (sum(pack.lengths), 3 * patch_size**2), generator=generator, dtype=torch.uint8)
    return make_batch(patches, pack.lengths, pack.num_tokens), torch.arange(len(pack.lengths))


class EncoderStep:
    """A model with its optimizer, and what a step does."""

    def __init__(self, config: TrainConfig, topology: ParallelTopology, *, num_classes: int) -> None:
        """
        Args:
            config: of `bench_config`.
            topology: of one process.
            num_classes: directions of the softmax.

        Raises:
            ConfigError: the encoder cannot be built on this machine.
        """
        (self._chunk,) = build_model_chunks(config, topology, None)
        self._lr, self._device = config.optim.lr, topology.device
        self.encoder = model_of(self._chunk).encoder
        self._optimizer = build_dense_optimizer(
            [self._chunk],
            config.optim,
            names=parameter_names([self._chunk]),
            num_layers=config.encoder.num_layers,
            dtype=weight_dtype(config),
            use_distributed_optimizer=False,
            process_groups=topology.process_groups,
        )
        generator = torch.Generator().manual_seed(2)
        directions = torch.randn(num_classes, config.encoder.hidden_size, generator=generator)
        self._directions = F.normalize(directions, dim=1).to(self._device)

    def forward_backward(self, batch: Batch, classes: Tensor) -> Tensor:
        """Adds the gradients of one microbatch; returns its loss.

        Args:
            batch: on the device.
            classes: [b] int64, on the device.
        """
        features = self._chunk(batch, {})
        assert isinstance(features, VisionFeatures)
        pooled = features.sample_embeddings(batch.num_samples)
        logits = _LOGIT_SCALE * F.normalize(pooled.float(), dim=1) @ self._directions.t()
        loss = F.cross_entropy(logits, classes % len(self._directions))
        loss.backward()
        return loss.detach()

    def __call__(self, batch: Batch, classes: Tensor, *, lr: float | None = None) -> Tensor:
        """Does a whole optimizer step; returns the loss before it."""
        self._optimizer.zero_grad()
        loss = self.forward_backward(batch, classes)
        self._chunk.finish_grad_sync()
        self._optimizer.gradient_norms()
        self._optimizer.step(self._lr if lr is None else lr)
        return loss
