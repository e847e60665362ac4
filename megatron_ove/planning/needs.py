"""What a run's encoder and objectives need, asked of their kinds."""

from __future__ import annotations

from megatron_ove.config.train import TrainConfig
from megatron_ove.model.parameter_names import part_name
from megatron_ove.optim.parts import is_in_any
from megatron_ove.planning.devices import Device
from megatron_ove.planning.footprint import EncoderFootprint, ObjectiveFootprint
from megatron_ove.planning.layout import Layout, Place
from megatron_ove.planning.parameters import Parameter
from megatron_ove.planning.table_plan import TablePlan
from megatron_ove.planning.workload import Workload


def encoder_footprint(config: TrainConfig) -> EncoderFootprint:
    """Returns that of the run's encoder."""
    return config.kinds.encoders[config.encoder.kind].footprint()


def objective_footprint(config: TrainConfig, name: str) -> ObjectiveFootprint:
    """Returns that of an objective."""
    return config.kinds.objectives[config.objectives[name].kind].footprint()


def chunk_parameters(config: TrainConfig, layout: Layout, *, stage: int, chunk: int) -> list[Parameter]:
    """Returns all weights of a model chunk: the encoder's, and on the last chunk those of objectives' modules."""
    parameters = encoder_footprint(config).parameters(config, layout, stage=stage, chunk=chunk)
    if layout.is_last(stage, chunk):
        for name in config.objectives:
            parameters = parameters + objective_footprint(config, name).parameters(config, name, layout)
    return parameters


def trained_parameters(config: TrainConfig, layout: Layout, *, stage: int, chunk: int) -> list[Parameter]:
    """Returns the weights of a model chunk that have gradients, moments and room in a buffer: all but `freeze`."""
    offset = layout.layers_of(stage, chunk).start
    encoder = encoder_footprint(config).parameters(config, layout, stage=stage, chunk=chunk)
    named = [(part_name(f"encoder.{one.name}", offset), one) for one in encoder]
    if layout.is_last(stage, chunk):
        for name in config.objectives:
            own = objective_footprint(config, name).parameters(config, name, layout)
            named += [(f"objectives.{name}.{one.name}", one) for one in own]
    return [one for name, one in named if not is_in_any(name, config.freeze)]


def plan_tables(
    config: TrainConfig, layout: Layout, place: Place, workload: Workload, device: Device
) -> list[TablePlan]:
    """Returns the tables of a rank; none off the last stage."""
    if place.stage != layout.pipeline - 1:
        return []
    tables = [
        objective_footprint(config, name).table(config, name, layout, place, workload.items_of(objective), device)
        for name, objective in config.objectives.items()
    ]
    return [table for table in tables if table is not None]
