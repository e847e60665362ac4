"""Other ways to run the same training: layouts ranked by step time, and single settings ranked by the memory they save.

Every candidate is a complete configuration that passes all checks, planned like any other; what the checks refuse is
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import ConfigError
from megatron_ove.planning.devices import GPUS_PER_NODE, Device
from megatron_ove.planning.needs import encoder_footprint, objective_footprint
from megatron_ove.planning.plan import Plan, make_plan
from megatron_ove.planning.stored_samples import StoredSamples


@dataclass(frozen=True)
class Knob:
    """One changed setting and what becomes of the fullest rank.

    Attributes:
        change: as one would write it in the configuration.
        plan: with the change.
    """

    change: str
    plan: Plan

    @property
    def memory(self) -> int:
        return self.plan.fullest.memory.total


def rank_knobs(plan: Plan) -> list[Knob]:
    """Returns settings that lower the memory of the fullest rank, the most helpful first."""
    before = plan.fullest.memory.total
    knobs = []
    for changes in _memory_changes(plan):
        changed = _planned(plan.config, changes, plan.layout.world_size, plan.device, plan.samples)
        if changed is not None and changed.fullest.memory.total < before:
            knobs.append(Knob(", ".join(f"{path}: {_yaml(value)}" for path, value in changes.items()), changed))
    return sorted(knobs, key=lambda knob: knob.memory)


def suggest_layouts(
    config: TrainConfig, *, world_size: int, device: Device, samples: StoredSamples | None = None
) -> list[Plan]:
    """Returns layouts of `world_size` ranks that fit, the fastest first.

    Tensor groups stay within a node, share the sequence where there are several ranks, and the optimizer is shared by
    data ranks where there are several. Of pipelines whose last stage, which has the heads, holds fewer layers than the
    others, the fastest is listed beside the even one.
    """
    plans = []
    for tensor, pipeline, chunks in _grids(config, world_size):
        replicas = world_size // (tensor * pipeline)
        changes = {
            "parallel.tensor_model_parallel_size": tensor,
            "parallel.pipeline_model_parallel_size": pipeline,
            "parallel.virtual_pipeline_model_parallel_size": chunks,
            "parallel.num_layers_in_first_stage": None,
            "parallel.num_layers_in_last_stage": None,
            "parallel.sequence_parallel": tensor > 1,
            "parallel.use_distributed_optimizer": replicas > 1,
        }
        if replicas == 1:
            changes["parallel.overlap_param_gather"] = False
        for sizes in _last_stages(config.encoder.num_layers, pipeline, chunks or 1):
            fastest: Plan | None = None
            for size in sizes:
                change = {**changes, "parallel.num_layers_in_last_stage": size}
                plan = _planned(config, change, world_size, device, samples)
                if plan is None or (fastest is not None and plan.time.total >= fastest.time.total):
                    break  # the lighter the last stage the better, up to a point
                fastest = plan
            if fastest is not None and fastest.fits:
                plans.append(fastest)
    return sorted(plans, key=lambda plan: plan.time.total)


def _grids(config: TrainConfig, world_size: int) -> Iterator[tuple[int, int, int | None]]:
    layers = config.encoder.num_layers
    for tensor in (size for size in range(1, GPUS_PER_NODE + 1) if world_size % size == 0):
        for pipeline in (size for size in range(1, layers + 1) if world_size % (tensor * size) == 0):
            yield tensor, pipeline, None
            for chunks in (2, 3, 4):
                if pipeline > 1 and pipeline * chunks <= layers:
                    yield tensor, pipeline, chunks


def _last_stages(layers: int, pipeline: int, chunks: int) -> Iterator[list[int | None]]:
    """Yields the even split, as [None], and the sizes of a last stage that is lighter than the others, largest first;
    each where there are any."""
    if layers % (pipeline * chunks) == 0:
        yield [None]
    smaller: list[int | None] = [
        size
        for size in range(chunks, layers // pipeline + 1, chunks)
        if pipeline > 1 and size * pipeline < layers and (layers - size) % ((pipeline - 1) * chunks) == 0
    ]
    if smaller:
        yield smaller[::-1]


def _memory_changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yields settings that may save memory, each as {path: value}."""
    config, parallel = plan.config, plan.config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if not parallel.use_distributed_optimizer:
        yield {"parallel.use_distributed_optimizer": True}
    if tensor > 1 and not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    yield from encoder_footprint(config).memory_changes(config)
    largest = max(max(one.list_budgets(config.encoder.patch_size)) for one in config.data.sources.values())
    if config.data.tokens_per_microbatch // 2 >= largest:
        yield {"data.tokens_per_microbatch": config.data.tokens_per_microbatch // 2}
    yield {"parallel.tensor_model_parallel_size": 2 * tensor, "parallel.sequence_parallel": True}
    yield {"parallel.pipeline_model_parallel_size": 2 * pipeline}
    if pipeline > 1 and plan.fullest.stage in (0, pipeline - 1):
        # This stage gives layers to the others, as few as can be shared out evenly.
        end, other = ("first", "last") if plan.fullest.stage == 0 else ("last", "first")
        size = plan.layout.stage_layers[plan.fullest.stage] - (pipeline - 1) * plan.layout.chunks
        change: dict[str, Any] = {f"parallel.num_layers_in_{end}_stage": size}
        is_set = getattr(parallel, f"num_layers_in_{other}_stage") is not None
        yield {**change, f"parallel.num_layers_in_{other}_stage": None} if is_set else change
    yield from _table_changes(config)


def _table_changes(config: TrainConfig) -> Iterator[dict[str, Any]]:
    centers = config.optim.class_centers
    for setting, light in (("weight_dtype", "bfloat16"), ("first_moment", "none"), ("second_moment", "row")):
        if getattr(centers, setting) != light:
            yield {f"optim.class_centers.{setting}": light}
    sizes = {name: objective_footprint(config, name).num_table_elements(config, name) for name in config.objectives}
    for name in sorted(config.objectives, key=lambda name: -sizes[name]):
        yield from objective_footprint(config, name).memory_changes(config, name)


def _planned(
    config: TrainConfig, changes: dict[str, Any], world_size: int, device: Device, samples: StoredSamples | None
) -> Plan | None:
    """Returns the plan with some settings changed; None where the configuration does not allow them."""
    data = config.model_dump(mode="python")
    for path, value in changes.items():
        *sections, key = path.split(".")
        node = data
        for section in sections:
            node = node[section]
        node[key] = value
    try:
        changed = config_from_dict(data, config.name)
        return make_plan(changed, world_size=world_size, device=device, samples=samples)
    except ConfigError:
        return None


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
