"""Memory of one rank, by component, at the fullest moment of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ove.config.train import TrainConfig
from megatron_ove.planning.activations import peak_activations
from megatron_ove.planning.footprint import ChunkActivations, activation_bytes
from megatron_ove.planning.layout import Layout, Place
from megatron_ove.planning.needs import chunk_parameters, encoder_footprint, objective_footprint, trained_parameters
from megatron_ove.planning.parameters import gradient_buffer
from megatron_ove.planning.table_plan import TablePlan
from megatron_ove.planning.workload import Workload

COMPONENTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "class_tables",
    "active_rows",
    "batches",
    "temporary",
)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by component, in the order of `COMPONENTS`.

    Attributes:
        parameters: dense weights, with the distributed optimizer their padded buffer; and their moving average.
        gradients: fp32 buffer that megatron-core reduces.
        optimizer: two fp32 moments, and fp32 master weights of a bf16 model; a share under the distributed optimizer.
        activations: what backward passes wait for, at the fullest moment of the schedule.
        class_tables: stored centers and moments.
        active_rows: what a step keeps for its active rows.
        batches: patches and positions of the steps on the device.
        temporary: what comes and goes: gradients of one layer beside all activations; or, where that is more than both,
            what reducing gradients or updating weights takes after activations are gone.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    class_tables: int
    active_rows: int
    batches: int
    temporary: int
    in_flight: list[int] = field(default_factory=list)

    def by_component(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def total(self) -> int:
        return sum(self.by_component().values())


def plan_memory(
    config: TrainConfig,
    layout: Layout,
    place: Place,
    workload: Workload,
    tables: list[TablePlan],
    *,
    is_gpu: bool,
) -> RankMemory:
    """Adds up what a rank holds."""
    item = activation_bytes(config)
    parameters = gradients = optimizer = 0
    buckets, all_owned = [0], [0]
    for chunk in range(layout.chunks):
        all_sizes = chunk_parameters(config, layout, stage=place.stage, chunk=chunk)
        sizes = trained_parameters(config, layout, stage=place.stage, chunk=chunk)
        frozen = sum(p.size for p in all_sizes) - sum(p.size for p in sizes)
        buffer = gradient_buffer(sizes, layout, stage=place.stage, chunk=chunk)
        owned = buffer.owned(place.data, layout.data) if layout.distributed_optimizer else [p.size for p in sizes]
        parameters += item * (frozen + (buffer.size if layout.distributed_optimizer else sum(p.size for p in sizes)))
        gradients += 4 * buffer.size
        if config.train.ema_decay is not None:
            parameters += 4 * sum(p.size for p in all_sizes)
        optimizer += sum(owned) * (8 + (4 if item == 2 else 0)) + 4 * len(owned)
        buckets += [4 * size for size in buffer.buckets]
        all_owned += owned
    is_last = place.stage == layout.pipeline - 1
    objectives = {name: objective_footprint(config, name) for name in config.objectives} if is_last else {}
    parameters += sum(one.frozen_bytes(config, name, layout) for name, one in objectives.items())
    samples = int(workload.num_samples[:, place.data].max())
    chunks = [
        encoder_footprint(config).activations(config, layout, stage=place.stage, chunk=chunk, num_samples=samples)
        for chunk in range(layout.chunks)
    ]
    for name, one in objectives.items():  # on the last chunk, beside its part of the encoder
        own, last = one.activations(config, name, layout), chunks[-1]
        chunks[-1] = ChunkActivations(last.kept + own.kept, max(last.again, own.again), max(last.work, own.work))
    activations, in_flight = peak_activations(layout, place.stage, workload.num_microbatches, chunks)
    backward = activations + max(part.work for part in chunks) + sum(table.work_bytes for table in tables)
    # gloo reduces and scatters a copy; torch's AdamW makes three tensors of each parameter, on GPUs one of all at once.
    is_copied = layout.distributed_optimizer and layout.data > 1 and not is_gpu
    exchange = max(buckets) if is_copied else 0
    update = 4 * sum(all_owned) if is_gpu else 3 * 4 * max(all_owned)
    return RankMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        class_tables=sum(table.stored_bytes for table in tables),
        active_rows=sum(table.step_bytes for table in tables),
        batches=batch_bytes(config, place, workload),
        temporary=max(backward, exchange, update) - activations,
        in_flight=in_flight,
    )


def batch_bytes(config: TrainConfig, place: Place, workload: Workload) -> int:
    """Returns patches (first stage) and positions of one step's microbatches; further steps wait on the host."""
    patches = 3 * config.encoder.patch_size**2 if place.stage == 0 else 0
    return workload.num_microbatches * workload.tokens_per_microbatch * (patches + 3 * 4)
