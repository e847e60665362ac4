"""The two training steps that are compared, behind one interface, on the same samples with the same encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from encoder_contenders import encoder_config, plain_encoder
from plain_vit import normalize_pixels
from published_head import PublishedHead
from published_loop import PublishedLoop
from torch import Tensor
from train_step_work import LABELS_PER_STEP, SAMPLE_RATE, SOURCES, StepSamples, Workload

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack, Samples
from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.patchify import grid_positions, write_patches
from megatron_ove.data.step_loader import LoadedStep
from megatron_ove.model.encoder import build_encoder
from megatron_ove.objectives.build import build_objectives
from megatron_ove.optim.optimizer import build_dense_optimizer
from megatron_ove.parallel.topology import ParallelTopology, initialize_topology
from megatron_ove.training.build_model import build_model_chunks, model_of, parameter_names, weight_dtype
from megatron_ove.training.cpu_memory import prepare_cpu_memory
from megatron_ove.training.step_timers import StepTimers
from megatron_ove.training.train_step import TrainStep

LEARNING_RATE = 5e-5


class OurStep:
    """Ours: all samples of all sources in one pack, one forward, row-sparse heads, fp32 master weights under bf16."""

    def __init__(self, work: Workload, topology: ParallelTopology, head_options: Mapping[str, Any]) -> None:
        self._config = config = _train_config(work, head_options)
        self._work, self._topology, self._step = work, topology, 0
        objectives = build_objectives(
            config.objectives,
            kinds=config.kinds,
            topology=topology,
            embedding_size=config.encoder.hidden_size,
            seed=config.seed,
            optim=config.optim.class_centers,
            dtype=weight_dtype(config),
        )
        chunks = build_model_chunks(config, topology, objectives)
        optimizer = build_dense_optimizer(
            chunks,
            config.optim,
            names=parameter_names(chunks),
            num_layers=config.encoder.num_layers,
            dtype=weight_dtype(config),
            use_distributed_optimizer=False,
            process_groups=topology.process_groups,
        )
        self._timers, self._objectives = StepTimers(topology.device), objectives
        self._train_step = TrainStep(topology, chunks, objectives, optimizer, self._timers)
        self._encoder = model_of(chunks[0]).encoder
        self._next: Batch = self._prepare()

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        """Returns the pooled embeddings of the first step's samples."""
        return {"pooled": self._encoder(self._next.main).pooled.float().cpu()}

    def prepare(self) -> None:
        """Makes the samples of the next step."""
        self._next = self._prepare()

    def step(self) -> dict[str, float]:
        """One optimizer step."""
        self._step += 1
        with self._timers.step(self._step):
            with self._timers.phase("head"):
                counts = {name: np.array([[len(self._next.samples.of(name))]]) for name in SOURCES}
                prepared = self._objectives.prepare_step(self._step - 1, [self._next], counts)
            result = self._train_step(
                LoadedStep((self._next,), prepared, num_bad=0), lr=LEARNING_RATE, wants_stop=False
            )
        assert result.accepted
        return self._timers.take()

    def _prepare(self) -> Batch:
        patch_size = self._config.encoder.patch_size
        return pack(self._work.draw(self._step, patch_size), patch_size).to(self._topology.device)


class PublishedStep:
    """The published shape; see `published_loop.py`."""

    def __init__(self, work: Workload, topology: ParallelTopology) -> None:
        config = encoder_config(work.size, num_layers=work.num_layers)
        ours = build_encoder(config, topology, dtype=torch.float32, seed=0)
        device = topology.device
        heads = {
            name: PublishedHead(
                work.classes[name],
                config.hidden_size,
                num_slots=LABELS_PER_STEP,
                sample_rate=SAMPLE_RATE,
                lr=LEARNING_RATE,
                device=device,
            )
            for name in SOURCES
        }
        self._work, self._device, self._patch_size, self._step = work, device, config.patch_size, 0
        self._timers = StepTimers(device)
        self._loop = PublishedLoop(
            plain_encoder(ours, "eager"),
            heads,
            lr=LEARNING_RATE,
            autocast=work.precision == "bf16",
            timers=self._timers,
        )
        self._next = self._prepare()

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        """Returns the pooled embeddings of the first step's samples."""
        embeddings = self._loop.embed(*self._next)
        return {"pooled": torch.cat([embeddings[name] for name in SOURCES]).cpu()}

    def prepare(self) -> None:
        """Makes the samples of the next step."""
        self._next = self._prepare()

    def step(self) -> dict[str, float]:
        """One optimizer step."""
        self._step += 1
        with self._timers.step(self._step):
            self._loop.step(*self._next)
        return self._timers.take()

    def _prepare(self) -> tuple[dict[str, Tensor], StepSamples]:
        samples = self._work.draw(self._step, self._patch_size)
        pixels = {name: normalize_pixels(value.to(self._device)) for name, value in samples.pixels.items()}
        moved = StepSamples(
            {},
            {name: value.to(self._device) for name, value in samples.labels.items()},
            samples.visible.to(self._device),
            samples.collage_frames.to(self._device),
        )
        return pixels, moved


def build_contender(name: str, work: Workload, head_options: Mapping[str, Any]) -> OurStep | PublishedStep:
    """Builds `ours` or `published` in a process of its own."""
    topology = initialize_topology(ParallelConfig.model_validate({"device": work.device}), seed=0)
    if name == "published":
        return PublishedStep(work, topology)
    if work.device == "cpu":
        prepare_cpu_memory()  # as `megatron-ove train` does
    return OurStep(work, topology, head_options)


def pack(samples: StepSamples, patch_size: int) -> Batch:
    """Returns one microbatch of all samples: pictures, pages, clips."""
    parts = [_whole(picture, patch_size) for name in ("image", "ocr") for picture in samples.pixels[name]]
    clips, num_visible = samples.pixels["video"], len(samples.visible)
    for clip, visible in zip(clips, samples.visible, strict=False):
        patches, positions = _frames(clip, range(len(clip)), patch_size)
        parts.append((patches[visible], positions[visible]))
    for clip, frames in zip(clips[num_visible:], samples.collage_frames, strict=True):
        patches, positions = _frames(clip, frames.tolist(), patch_size)
        rows = clip.shape[-2] // patch_size
        # Stacked one below the other: t = 0, and the n-th frame's rows follow those of the frames before it.
        order = torch.arange(len(frames), dtype=torch.int32).repeat_interleave(len(positions) // len(frames))
        positions[:, 1] += order * rows
        positions[:, 0] = 0
        parts.append((patches, positions))
    counts = [len(samples.labels[name]) for name in SOURCES]
    lengths = torch.tensor([0, *(len(positions) for _, positions in parts)], dtype=torch.int32)
    patch_pack = PatchPack.of_whole_samples(
        positions=torch.cat([positions for _, positions in parts]),
        cu_seqlens=lengths.cumsum(0, dtype=torch.int32),
        patches=torch.cat([patches for patches, _ in parts]),
    )
    keys = tuple(f"sample-{index}" for index in range(len(parts)))
    source = torch.arange(len(SOURCES), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    known = replace(
        Samples.of_one_source(SOURCES[0], keys, torch.arange(len(parts))), source_names=SOURCES, source=source
    )
    return Batch({MAIN_PACK: patch_pack}, known, samples.labels)


def _whole(picture: Tensor, patch_size: int, *, frame: int = 0) -> tuple[Tensor, Tensor]:
    """[3, H, W] uint8 -> patches [S, 3 * p * p] and positions [S, 3]."""
    rows, columns = (size // patch_size for size in picture.shape[-2:])
    patches = torch.empty(rows * columns, 3 * patch_size**2, dtype=torch.uint8)
    write_patches(picture.permute(1, 2, 0).contiguous(), patches, patch_size)
    return patches, torch.from_numpy(grid_positions(rows, columns, frame=frame))


def _frames(clip: Tensor, frames: Sequence[int], patch_size: int) -> tuple[Tensor, Tensor]:
    parts = [_whole(clip[frame], patch_size, frame=frame) for frame in frames]
    return torch.cat([patches for patches, _ in parts]), torch.cat([positions for _, positions in parts])


def _train_config(work: Workload, head_options: Mapping[str, Any]) -> TrainConfig:
    """Returns the run whose step is timed; samples are made here, so its sources are never opened."""
    kinds = {"image": {"image_size": work.picture_side}, "ocr": {}, "video": {}}
    head = {"kind": "partial_fc", "labels_per_step": LABELS_PER_STEP, **head_options}
    document = {
        "name": "benchmark",
        "run_dir": "unused",
        "encoder": encoder_config(work.size, num_layers=work.num_layers).model_dump(),
        "parallel": {"device": work.device},
        "objectives": {name: {"source": name, "num_classes": work.classes[name], **head} for name in SOURCES},
        "data": {
            "sources": {name: {"kind": name, "path": "unused", **options} for name, options in kinds.items()},
            "tokens_per_microbatch": 65_536,
        },
        "train": {"num_steps": 1, "global_batch_size": sum(work.samples.values()), "precision": work.precision},
    }
    return config_from_dict(document, "the benchmark's run")
