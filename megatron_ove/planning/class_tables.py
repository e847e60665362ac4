"""What a class-center table stores on a rank and what a step adds to it, in the terms of `heads/class_centers.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.heads.active_classes import expect_active_rows
from megatron_ove.heads.fused_softmax import MOST_LABELS, MOST_SETS, SAMPLE_PADDING
from megatron_ove.heads.margin_softmax import LARGEST_FP32_SCALE
from megatron_ove.parallel.shard_range import shard_range
from megatron_ove.planning.devices import Device
from megatron_ove.planning.footprint import ObjectiveFootprint
from megatron_ove.planning.layout import Layout, Place
from megatron_ove.planning.parameters import Parameter
from megatron_ove.planning.table_plan import TablePlan

_STORAGE_BYTES = {"float32": 4, "bfloat16": 2, "none": 0}


class PartialFCFootprint(ObjectiveFootprint):
    """A Partial-FC head."""

    def table(
        self, config: TrainConfig, name: str, layout: Layout, place: Place, counts: np.ndarray, device: Device
    ) -> TablePlan | None:
        return plan_table(name, _section(config, name), config, layout, place, counts, device)

    def message_width(self, section: PartialFCConfig) -> int:
        return section.labels_per_step * section.items_per_sample

    def parameters(self, config: TrainConfig, name: str, layout: Layout) -> list[Parameter]:
        return region_pool_parameters(_section(config, name), config.encoder.hidden_size)

    def num_table_elements(self, config: TrainConfig, name: str) -> int:
        return _section(config, name).table_size * config.encoder.hidden_size

    def memory_changes(self, config: TrainConfig, name: str) -> Iterator[dict[str, Any]]:
        section = _section(config, name)
        if section.class_group == "tensor":
            yield {f"objectives.{name}.class_group": "stage"}
        if section.num_sampled is None:
            yield {f"objectives.{name}.sample_rate": section.sample_rate / 2}


def region_pool_parameters(section: PartialFCConfig, width: int) -> list[Parameter]:
    """Returns those of `objectives/regions/region_pool.py`, where a head has one."""
    if section.level != "region" or section.regions.pooling != "attention":
        return []
    return [
        Parameter("region_pool.probe", (width,)),
        Parameter("region_pool.key_value.weight", (2 * width, width)),
        Parameter("region_pool.key_value.bias", (2 * width,)),
        Parameter("region_pool.out.weight", (width, width)),
        Parameter("region_pool.out.bias", (width,)),
    ]


def _section(config: TrainConfig, name: str) -> PartialFCConfig:
    section = config.objectives[name]
    assert isinstance(section, PartialFCConfig)
    return section


def plan_table(
    name: str,
    objective: PartialFCConfig,
    config: TrainConfig,
    layout: Layout,
    place: Place,
    counts: np.ndarray,
    device: Device,
) -> TablePlan:
    """Returns the table of a head on one rank of the last stage."""
    optim, size = config.optim.class_centers, config.encoder.hidden_size
    is_wide, is_fused = objective.class_group == "stage", _is_fused(config, objective, device)
    sharers = layout.tensor * layout.data if is_wide else layout.tensor
    rank = place.tensor + (layout.tensor * place.data if is_wide else 0)
    start, stop = shard_range(objective.table_size, sharers, rank)
    num_rows = stop - start
    sets = 1 if objective.inclusion_probability >= 1 else len(objective.slots_of_sets)
    active = count_active_rows(objective, num_rows, int(counts.sum()))
    seen = counts.sum(axis=1) if is_wide else counts[:, place.data]
    padding = SAMPLE_PADDING if is_fused else 1
    widths = -(-seen // padding) * padding
    is_dense = (not is_wide and layout.data > 1) or int(widths.sum()) > size
    compute = _compute_bytes(config, objective, device)
    weight = _STORAGE_BYTES[optim.weight_dtype]
    moments = _STORAGE_BYTES[optim.first_moment] * size + 4 * (size if optim.second_moment == "element" else 1)
    copies_rows = len(seen) > 1 if is_fused else weight != compute
    gradient = _gradient_bytes(active, size, int(widths.sum()), is_dense=is_dense, item=compute if is_fused else 4)
    return TablePlan(
        name=name,
        num_rows=num_rows,
        num_active=active,
        num_sets=sets,
        num_slots=objective.labels_per_step,
        embedding_size=size,
        stored_bytes=(num_rows + 1) * (size * weight + moments + 8),
        step_bytes=gradient
        + (_kept(active * size) * compute if copies_rows else 0)
        + active * (8 + sets * 4)
        + int(seen.sum()) * objective.labels_per_step * (16 + _co_weight_bytes(objective, sets)),
        work_bytes=_work_bytes(
            active, int(seen.max(initial=0)), size, objective.chunk_size, is_fused, is_dense, compute
        ),
        samples=seen,
        is_stage_wide=is_wide,
        is_dense=is_dense,
        statistics_bytes=4 if objective.logit_scale <= LARGEST_FP32_SCALE else 8,
        compute_bytes=compute,
        moved_bytes=(active if optim.update == "row_sparse" else num_rows) * 2 * (size * weight + moments),
    )


def count_active_rows(objective: PartialFCConfig, num_rows: int, num_samples: int) -> int:
    """Returns the active rows that a shard is expected to have in a step.

    Args:
        objective: what is sampled.
        num_rows: of the shard.
        num_samples: of the step, over all replicas; their labels are taken to fall anywhere.
    """
    return round(
        expect_active_rows(
            objective.table_size,
            num_rows,
            probability=objective.inclusion_probability,
            num_sets=len(objective.slots_of_sets),
            num_labels=num_samples * objective.labels_per_step,
        )
    )


def _is_fused(config: TrainConfig, objective: PartialFCConfig, device: Device) -> bool:
    """Whether Triton does the work, taking it to be installed on GPUs; as `objectives/partial_fc.py` decides."""
    if objective.backend == "torch" or not device.is_gpu:
        return False
    return (
        objective.labels_per_step <= MOST_LABELS
        and len(objective.slots_of_sets) <= MOST_SETS
        and objective.logit_scale <= LARGEST_FP32_SCALE
        and config.optim.class_centers.update == "row_sparse"
    )


def _compute_bytes(config: TrainConfig, objective: PartialFCConfig, device: Device) -> int:
    if objective.compute_dtype != "auto":
        return _STORAGE_BYTES[objective.compute_dtype]
    if config.train.precision == "fp32":
        return 4
    if device.is_gpu:
        return 2
    import torch

    return 2 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else 4


def _kept(num_elements: int) -> int:
    """Elements of memory that is used again in each step and so has room for a few rows more."""
    return num_elements + num_elements // 32


def _gradient_bytes(active: int, size: int, width: int, *, is_dense: bool, item: int) -> int:
    if is_dense:
        return (_kept(active * size) + active) * 4
    return _kept(active * width) * item + (active + width * size) * 4


def _co_weight_bytes(objective: PartialFCConfig, sets: int) -> int:
    return 4 * objective.labels_per_step if objective.co_positives == "negative" and sets > 1 else 0


def _work_bytes(active: int, samples: int, size: int, chunk: int, is_fused: bool, is_dense: bool, compute: int) -> int:
    """Embeddings and their gradient; on a GPU a dense gradient's cosines; in plain torch a few chunks."""
    embeddings = 4 * samples * size
    if is_fused:
        return embeddings + (active * samples * compute if is_dense else 0)
    rows = min(chunk, active)
    return embeddings + rows * (4 * size + compute * size) + 3 * 4 * rows * samples
