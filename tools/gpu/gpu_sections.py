"""The parts of the GPU benchmark that run the encoder: speed with MFU and memory, FP8 against bf16, the cross-over."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from gpu_measure import Section, data_sheet_of, median_seconds, peak_bytes, release_memory
from gpu_workloads import (
    SIZES,
    EncoderStep,
    LearnableSamples,
    Pack,
    bench_config,
    encoder_section,
    packs,
    random_samples,
    workload_of_pack,
)

from megatron_ove.config.fp8 import FP8_RECIPES
from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import ConfigError
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.planning.devices import find_device
from megatron_ove.planning.plan import make_plan, model_operations

T = TypeVar("T")

_FP8 = {f"fp8 {name}": {"fp8": name} for name in FP8_RECIPES}
# Compared at one size only: which kernels of which package.
_KERNELS = {
    "local layers, sdpa": {"layer_spec": "local", "attention_backend": "sdpa"},
    "local layers, sdpa, compiled rotation": {"layer_spec": "local", "attention_backend": "sdpa", "compile": True},
    "local layers, flash": {"layer_spec": "local", "attention_backend": "flash"},
    "Transformer Engine, its attention": {"layer_spec": "transformer_engine", "attention_backend": "auto"},
    "Transformer Engine, flash": {"layer_spec": "transformer_engine", "attention_backend": "flash"},
    "Transformer Engine, no fused kernels": {"layer_spec": "transformer_engine", "fused_kernels": False},
    "selective recompute": {"recompute": "selective"},
    "full recompute": {"recompute": "full"},
}
_CROSSOVER_WIDTHS = (512, 768, 1024, 1280, 1536, 2048, 3072, 4096)


@dataclass(frozen=True)
class Effort:
    """How much is run.

    Attributes:
        tiny: toy sizes, to see that everything runs.
        warmup: steps before timing.
        repeats: timed steps; medians are reported.
        loss_steps: of the comparison of losses.
        sizes: encoders whose speed is measured.
    """

    tiny: bool = False
    warmup: int = 5
    repeats: int = 20
    loss_steps: int = 200
    sizes: Sequence[str] = SIZES


def measure_speed(topology: ParallelTopology, effort: Effort) -> Section:
    """Times whole optimizer steps: every size on every pack in bf16 and FP8, and kernels against one another."""
    section = Section(
        "Speed, MFU and memory",
        "One optimizer step on one microbatch. MFU = operations that the model asks for (real tokens only, backward = "
        "2 x forward, nothing counted for recomputation) / (step time x the device's dense bf16 rate), for FP8 too, so "
        "that the lines compare. Planned memory is `megatron-ove plan`'s, peak memory what tensors took.",
    )
    all_packs = packs(tiny=effort.tiny)
    compared = "large" if "large" in effort.sizes else effort.sizes[0]
    cases = [(size, pack, {"bf16": {}, **_FP8}) for size in effort.sizes for pack in all_packs]
    cases += [(compared, pack, _KERNELS) for pack in all_packs[2 if effort.tiny else 1 :]]
    for size, pack, variants in cases:
        for variant, settings in variants.items():
            run = partial(_speed_row, topology, effort, size, pack, variant, settings)
            row = _try(section, f"{size}, {pack.name}, {variant}", run)
            section.rows += [row] if row else []
    if data_sheet_of(topology.device) is None:
        section.skipped.append(("MFU", "no data-sheet rate is known for this device, so there is nothing to divide by"))
    return section


def _speed_row(
    topology: ParallelTopology, effort: Effort, size: str, pack: Pack, variant: str, settings: dict[str, Any]
) -> dict[str, Any]:
    config = bench_config({**encoder_section(size, tiny=effort.tiny), **settings}, num_tokens=pack.num_tokens)
    device, workload = topology.device, workload_of_pack(pack)
    release_memory(device)
    step = EncoderStep(config, topology, num_classes=64)
    batch, classes = random_samples(pack, config.encoder.patch_size)
    batch, classes = batch.to(device), classes.to(device)
    seconds = median_seconds(lambda: step(batch, classes), device, warmup=effort.warmup, repeats=effort.repeats)
    sheet = data_sheet_of(device)
    operations = sum(model_operations(config, workload).values())
    plan = make_plan(config, world_size=1, device=sheet or find_device("cpu", world_size=1), workload=workload)
    return {
        "size": size,
        "pack": pack.name,
        "variant": variant,
        "step_ms": 1e3 * seconds,
        "tokens_per_s": sum(pack.lengths) / seconds,
        "mfu": operations / (seconds * sheet.rate("bf16")) if sheet else None,
        "peak_gib": _gib(peak_bytes(device)),
        "planned_gib": _gib(plan.fullest.memory.total),
        "estimated_ms": 1e3 * plan.time.total if sheet else None,
    }


def compare_losses(topology: ParallelTopology, effort: Effort) -> Section:
    """Trains the same model on the same data in bf16 and in every FP8 recipe, and compares the losses at the end."""
    last = max(1, effort.loss_steps // 10)
    section = Section(
        "FP8 against bf16: loss",
        f"{effort.loss_steps} steps on pictures that can be learned, same weights and data; mean loss of the last "
        f"{last} steps. The line fp32 says how far bf16 itself is from full precision.",
    )
    variants: dict[str, dict[str, Any]] = {"bf16": {}, "fp32": {"precision": "fp32"}, **_FP8}
    skipped = {"fp8_skip_first_layers": 1, "fp8_skip_last_layers": 1}
    variants["fp8 current, first and last layer bf16"] = {"fp8": "current", **skipped}
    reference: list[float] = []
    for variant, settings in variants.items():
        losses = _try(section, variant, partial(_train, topology, effort, dict(settings)))
        if losses is None:
            continue
        reference = reference or losses  # bf16 comes first and runs everywhere
        ours, theirs = (statistics.fmean(values[-last:]) for values in (losses, reference))
        section.rows.append(
            {
                "variant": variant,
                "first_loss": losses[0],
                "last_loss": ours,
                "difference_to_bf16": ours / theirs - 1,
                "losses": losses,
            }
        )
    return section


def _train(topology: ParallelTopology, effort: Effort, settings: dict[str, Any]) -> list[float]:
    precision = settings.pop("precision", "bf16")
    length, batch_size = (16, 8) if effort.tiny else (256, 32)
    encoder = {**encoder_section("base", tiny=effort.tiny), **settings}
    config = bench_config(encoder, num_tokens=length * batch_size, precision=precision, lr=3e-4)
    samples = LearnableSamples(
        num_classes=64, batch_size=batch_size, patches_per_sample=length, patch_size=config.encoder.patch_size
    )
    release_memory(topology.device)
    step, losses = EncoderStep(config, topology, num_classes=64), []
    for index in range(effort.loss_steps):
        batch, classes = samples(index)
        lr = config.optim.lr * min(1.0, (index + 1) / 20)
        losses.append(step(batch.to(topology.device), classes.to(topology.device), lr=lr))
    return [float(loss) for loss in losses]


def find_crossover(topology: ParallelTopology, effort: Effort) -> Section:
    """Times forward and backward of two layers by hidden size, in bf16 and FP8: from which width on FP8 pays."""
    section = Section(
        "FP8 cross-over by hidden size",
        "Forward and backward pass of 2 layers (heads of 64, MLP of 4 x the width) with their embedding and pooling; "
        "speed-up over bf16 of the same width, above 1 = FP8 is faster.",
    )
    pack = packs(tiny=effort.tiny)[1]
    for hidden in (128,) if effort.tiny else _CROSSOVER_WIDTHS:
        sizes = {"hidden_size": hidden, "num_attention_heads": hidden // 64, "ffn_hidden_size": 4 * hidden}
        row: dict[str, Any] = {"hidden_size": hidden}
        for variant, settings in {"bf16": {}, **_FP8}.items():
            encoder = {**sizes, "num_layers": 2, **settings}
            seconds = _try(section, f"{hidden}, {variant}", partial(_time_layers, topology, effort, encoder, pack))
            row[f"{variant} ms"] = None if seconds is None else 1e3 * seconds
        for variant in _FP8:
            fp8, bf16 = row[f"{variant} ms"], row["bf16 ms"]
            row[f"{variant} speed-up"] = bf16 / fp8 if fp8 and bf16 else None
        section.rows.append(row)
    return section


def _time_layers(topology: ParallelTopology, effort: Effort, encoder: dict[str, Any], pack: Pack) -> float:
    config: TrainConfig = bench_config(encoder, num_tokens=pack.num_tokens)
    release_memory(topology.device)
    step = EncoderStep(config, topology, num_classes=64)
    batch, classes = random_samples(pack, config.encoder.patch_size)
    batch, classes = batch.to(topology.device), classes.to(topology.device)
    return median_seconds(
        lambda: step.forward_backward(batch, classes), topology.device, warmup=effort.warmup, repeats=effort.repeats
    )


def _try(section: Section, what: str, run: Callable[[], T]) -> T | None:
    """Returns what `run` returns; or None, with the reason among what was skipped."""
    try:
        return run()
    except ConfigError as error:
        section.skipped.append((what, " ".join(str(error).split())))
    except torch.OutOfMemoryError:
        section.skipped.append((what, "it does not fit into this device's memory"))
    return None


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30
