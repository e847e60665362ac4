"""`make_plan`: a configuration, a number of ranks and a device make a `Plan`; nothing is allocated, nothing started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_ove.config.fp8 import FP8_RECIPES
from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import ConfigError
from megatron_ove.planning.communication import Traffic, plan_communication
from megatron_ove.planning.devices import Device
from megatron_ove.planning.layout import Layout, Place, layout_of
from megatron_ove.planning.memory import RankMemory, plan_memory
from megatron_ove.planning.needs import chunk_parameters, objective_footprint, plan_tables
from megatron_ove.planning.stored_samples import StoredSamples
from megatron_ove.planning.table_plan import TablePlan
from megatron_ove.planning.timing import StepTime, estimate_step
from megatron_ove.planning.workload import Workload, assumed_workload, usual_workload

_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class RankPlan:
    """The first rank of a pipeline stage, which holds at least as much as any other of it.

    Attributes:
        rank: its number.
        stage: pipeline stage.
        num_layers: transformer layers.
        memory: by component.
        traffic: messages of a step.
        tables: class-center tables.
    """

    rank: int
    stage: int
    num_layers: int
    memory: RankMemory
    traffic: list[Traffic]
    tables: list[TablePlan]


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        workload: of the step whose time, messages and operations are planned.
        samples: that this step holds; None = every one at its largest size.
        ranks: one for each pipeline stage; memory is that of a step of the largest samples.
        num_parameters: of the encoder and objectives' modules, and of all class centers.
        operations: of a step over all replicas, by part.
        time: of a step.
    """

    config: TrainConfig
    layout: Layout
    device: Device
    workload: Workload
    samples: StoredSamples | None
    ranks: list[RankPlan]
    num_parameters: tuple[int, int]
    operations: dict[str, float]
    time: StepTime

    @property
    def fullest(self) -> RankPlan:
        """The rank that needs most memory."""
        return max(self.ranks, key=lambda rank: rank.memory.total)

    @property
    def fits(self) -> bool:
        return self.fullest.memory.total <= self.device.usable

    @property
    def mfu(self) -> float:
        """Operations that the model asks for, over what all devices could do in the step's time."""
        rate = self.device.rate(self.config.train.precision) * self.layout.world_size
        return sum(self.operations.values()) / (self.time.total * rate)

    @property
    def bubble_share(self) -> float:
        return self.time.bubble / self.time.total

    @property
    def num_samples(self) -> int:
        """Samples of the whole run."""
        return self.config.train.num_steps * self.config.train.global_batch_size

    @property
    def stored_patches(self) -> dict[str, float]:
        """Mean patches of a sample, of the sources whose shard sets were looked at."""
        if self.samples is None:
            return {}
        return {name: mean for name, mean in self.samples.mean_patches.items() if name not in self.samples.missing}

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.config.train.num_steps * self.time.total

    @property
    def device_hours(self) -> float:
        return self.seconds / 3600 * self.layout.world_size

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return {
            "name": self.config.name,
            "device": asdict(self.device) | {"usable": self.device.usable},
            "layout": asdict(self.layout) | {"world_size": self.layout.world_size},
            "microbatches_per_replica": self.workload.num_microbatches,
            "tokens_per_microbatch": self.workload.tokens_per_microbatch,
            "padding_share": self.workload.padding_share,
            "patches_of_stored_samples": self.stored_patches,
            "encoder_parameters": self.num_parameters[0],
            "class_center_parameters": self.num_parameters[1],
            "fits": self.fits,
            "ranks": [
                {
                    "rank": one.rank,
                    "stage": one.stage,
                    "layers": one.num_layers,
                    "memory_bytes": one.memory.by_component() | {"total": one.memory.total},
                    "microbatches_in_flight": one.memory.in_flight,
                    "traffic": [asdict(message) for message in one.traffic],
                    "active_rows": {table.name: table.num_active for table in one.tables},
                }
                for one in self.ranks
            ],
            "operations_per_step": self.operations,
            "step_time_s": asdict(self.time) | {"total": self.time.total},
            "samples_per_s": self.config.train.global_batch_size / self.time.total,
            "mfu": self.mfu,
            "bubble_share": self.bubble_share,
            "samples": self.num_samples,
            "days": self.seconds / _SECONDS_PER_DAY,
            "device_hours": self.device_hours,
        }


def make_plan(
    config: TrainConfig,
    *,
    world_size: int,
    device: Device,
    workload: Workload | None = None,
    samples: StoredSamples | None = None,
) -> Plan:
    """Plans a run.

    Args:
        config: the run, every `num_classes` known.
        world_size: ranks.
        device: that each rank has.
        workload: of a step; None assumes that every sample is as large as it may be.
        samples: that steps really hold, for time, messages and operations; None = as `workload`.

    Raises:
        ConfigError: the configuration does not fit the world size, or the device has no such FP8.
    """
    _check_fp8(config, device)
    layout = layout_of(config, world_size)
    worst = workload or assumed_workload(config, layout)
    workload = worst if samples is None else usual_workload(config, layout, samples)
    places = [Place(stage=stage) for stage in range(layout.pipeline)]
    ranks = [_plan_rank(config, layout, place, worst, workload, device) for place in places]
    operations = model_operations(config, workload)
    tables = ranks[-1].tables
    sharers = {True: layout.tensor * layout.data, False: layout.tensor}
    replicas = {True: 1, False: layout.data}
    operations["class centers"] = sum(
        table.operations * sharers[table.is_stage_wide] * replicas[table.is_stage_wide] for table in tables
    )
    time = estimate_step(
        _at_length(config, workload),
        layout,
        workload,
        device,
        tables=tables,
        traffic=[one.traffic for one in ranks],
        memory=[one.memory for one in ranks],
    )
    return Plan(config, layout, device, workload, samples, ranks, _count_parameters(config), operations, time)


def _check_fp8(config: TrainConfig, device: Device) -> None:
    recipe = FP8_RECIPES.get(getattr(config.encoder, "fp8", "off"))
    if recipe and not (device.capability and recipe.oldest <= device.capability < recipe.below):
        raise ConfigError(
            f"encoder.fp8 = {config.encoder.fp8} runs on {recipe.devices}, which --gpu {device.name} is not, so a run "
            "there would be refused; use another fp8 recipe or device, or set encoder.fp8: off"
        )


def _plan_rank(
    config: TrainConfig, layout: Layout, place: Place, worst: Workload, workload: Workload, device: Device
) -> RankPlan:
    tables = plan_tables(config, layout, place, workload, device)
    largest_tables = plan_tables(config, layout, place, worst, device)
    return RankPlan(
        rank=layout.rank_of(place),
        stage=place.stage,
        num_layers=layout.stage_layers[place.stage],
        memory=plan_memory(config, layout, place, worst, largest_tables, is_gpu=device.is_gpu),
        traffic=plan_communication(_at_length(config, workload), layout, place, workload, tables),
        tables=tables,
    )


def _at_length(config: TrainConfig, workload: Workload) -> TrainConfig:
    """Returns the configuration with microbatches as long as the workload's, for time and messages; memory has to do
    for a step that fills its token budget."""
    length = {"tokens_per_microbatch": workload.tokens_per_microbatch}
    return config.model_copy(update={"data": config.data.model_copy(update=length)})


def _count_parameters(config: TrainConfig) -> tuple[int, int]:
    whole = Layout(1, 1, 1, 1, (config.encoder.num_layers,), False, False)
    dense = sum(one.size for one in chunk_parameters(config, whole, stage=0, chunk=0))
    tables = sum(objective_footprint(config, name).num_table_elements(config, name) for name in config.objectives)
    return dense, tables


def model_operations(config: TrainConfig, workload: Workload) -> dict[str, float]:
    """Returns the operations of a whole step that the encoder asks for, by part, over all replicas.

    Only real tokens count, nothing is counted twice for recomputation or tensor parallelism: what MFU is measured by.
    """
    return config.kinds.encoders[config.encoder.kind].operations(
        config.encoder,
        tokens=float(workload.real_tokens.sum()),
        samples=float(workload.num_samples.sum()),
        squares=float(workload.sample_squares.sum()),
    )
