"""What `megatron-ove plan` computes is what a run on gloo does: every message, and the memory of every component."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_ove.data.step_loader import StepLoader
from megatron_ove.parallel import gradient_buckets
from megatron_ove.planning.communication import plan_communication
from megatron_ove.planning.devices import find_device
from megatron_ove.planning.layout import Place, layout_of
from megatron_ove.planning.memory import plan_memory
from megatron_ove.planning.needs import chunk_parameters, plan_tables
from megatron_ove.planning.workload import workload_of
from tests.support.distributed import run_distributed
from tests.support.tiny_run import check, tiny_config, write_tiny_sources

MEMORY_TOLERANCE = 0.10
"""Measured: parameters, gradients, optimizer and tables are exact, activations within 8 %, peaks within 5 %."""
TP2, PP2, VPP2 = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"virtual_pipeline_model_parallel_size": 2},
)
SP, DISTRIBUTED = {"sequence_parallel": True}, {"use_distributed_optimizer": True}
OVERLAP, GATHER = {"overlap_grad_reduce": True}, {"overlap_param_gather": True}
UNEVEN = {**PP2, "num_layers_in_last_stage": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # ranks, parallel section, others
    "one": (1, {}, {}),
    "tp2": (2, TP2, {"precision": "bf16"}),
    "dp2_tensor_group": (2, DISTRIBUTED, {"class_group": "tensor"}),
    "pp2": (2, PP2, {"recompute": "selective"}),
    "pp2_vpp2": (2, {**PP2, **VPP2}, {}),
    "tp2_sp_dp2": (4, {**TP2, **SP, **DISTRIBUTED}, {"precision": "bf16"}),
    "tp2_sp_pp2": (4, {**TP2, **SP, **PP2}, {"recompute": "full"}),
    "pp2_dp2": (4, {**PP2, **DISTRIBUTED}, {"precision": "bf16"}),
    "pp2_uneven_dp2": (
        4,
        {**PP2, **DISTRIBUTED, **OVERLAP, **GATHER, "num_layers_in_last_stage": 1},
        {"bucket_size": 90_000},
    ),
    "dp2_overlap": (2, OVERLAP, {"precision": "bf16", "bucket_size": 150_000}),
    "pp2_dp2_frozen": (4, {**PP2, **DISTRIBUTED}, {"freeze": ["encoder.head", "encoder.layernorm_pre"]}),
}


def trace_steps(rank: int, world_size: int, data: dict[str, Any], bucket_size: int | None) -> dict[str, Any]:
    """Runs two steps; returns what the second one sent and what this rank holds and held."""
    if bucket_size is not None:
        gradient_buckets.bucket_size = lambda data_size: bucket_size
    from tests.support.step_trace import KeptBytes, LiveBytes, MessageTrace

    with LiveBytes() as live:
        from megatron_ove.parallel.topology import initialize_topology
        from megatron_ove.training.trainer import Trainer

        config = check(data)
        topology = initialize_topology(config.parallel, seed=config.seed)
        ahead: dict[int, MessageTrace] = {}
        prepare_step = StepLoader._prepare_step

        def traced(loader: StepLoader, step: int) -> Any:
            with MessageTrace(topology) as ahead[step]:
                return prepare_step(loader, step)

        with mock.patch.object(StepLoader, "_prepare_step", traced):
            trainer = Trainer(config, topology)
        weights = {p.untyped_storage().data_ptr() for chunk in trainer.chunks for p in chunk.parameters()}
        for step in range(2):
            trace, kept = MessageTrace(topology), KeptBytes(lambda: weights)
            live.reset_peak()
            with trace:
                loaded = trainer.loader.load_step(step)
                with kept.hooks():
                    trainer.train_step(loaded, lr=1e-3, wants_stop=False)
        plan = trainer.loader._planner.plan(1)
        trainer.loader.close()
        return {
            "messages": _add_up(trace.messages, ahead[1].messages),
            "plan": plan,
            "place": Place(topology.pipeline_rank, topology.data_rank, topology.tensor_rank),
            "bytes": _bytes_by_object(trainer),
            "names": [
                [
                    (n.removeprefix("module.").removeprefix("encoder."), tuple(p.shape))
                    for n, p in chunk.module.named_parameters()
                ]
                for chunk in trainer.chunks
            ],
            "kept": kept.peak,
            "peak": live.peak,
        }


def _add_up(*traces: dict[tuple[str, str], list[int]]) -> dict[tuple[str, str], tuple[int, int]]:
    """Returns the messages of all threads together."""
    keys = {key for messages in traces for key in messages}
    return {key: tuple(sum(one[key][i] for one in traces if key in one) for i in range(2)) for key in keys}


def _bytes_by_object(trainer: Any) -> dict[str, int]:
    """Returns the bytes of distinct storages that each part of a run holds between two steps."""
    parameters = [p for chunk in trainer.chunks for p in chunk.parameters()]
    inner = [optimizer.optimizer for optimizer in trainer.optimizer._optimizer.chained_optimizers]
    states = [value for one in inner for state in one.state.values() for value in state.values()]
    masters = [p for one in inner for group in one.param_groups for p in group["params"]]
    tables = [trainer.objectives[name].centers._update for name in trainer.objectives or ()]
    stored = [t for table in tables for t in (table.weight, table.mean, table.square, table.steps, table.norms)]
    seen: set[int] = set()
    return {
        "parameters": _storage_bytes(parameters, seen),
        "gradients": _storage_bytes([b.grad_data for chunk in trainer.chunks for b in chunk.buffers], seen),
        "optimizer": _storage_bytes([*masters, *states], seen),
        "class_tables": _storage_bytes([t for t in stored if t is not None], seen),
    }


def _storage_bytes(tensors: list[Any], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request: pytest.FixtureRequest, sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns (configuration, what each rank saw)."""
    world_size, parallel, others = LAYOUTS[request.param]
    others = dict(others)
    bucket_size = others.pop("bucket_size", None)
    data = run_config(sources, tmp_path_factory.mktemp("run"), parallel, **others)
    with pytest.MonkeyPatch.context() as patch:
        if bucket_size is not None:
            patch.setattr(gradient_buckets, "bucket_size", lambda data_size: bucket_size)
        yield check(data), run_distributed(trace_steps, world_size, data, bucket_size, timeout_s=100)


def run_config(
    sources: dict[str, str],
    folder: Path,
    parallel: dict[str, Any],
    *,
    precision: str = "fp32",
    recompute: str = "none",
    class_group: str = "stage",
    freeze: Sequence[str] = (),
) -> dict[str, Any]:
    data = tiny_config(
        sources,
        folder,
        parallel={"timeout_s": 60, **parallel},
        encoder={"hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 384, "recompute": recompute},
        train={"num_steps": 4, "global_batch_size": 24, "precision": precision, "log_interval_steps": 1},
    )
    data["data"]["tokens_per_microbatch"] = 64
    data["freeze"] = list(freeze)
    for objective in data["objectives"].values():
        objective["class_group"] = class_group
    return data


def test_messages_are_what_is_sent(run):
    config, ranks = run
    layout, device = layout_of(config, len(ranks)), find_device("cpu", world_size=len(ranks))
    for rank in ranks:
        workload = workload_of(rank["plan"], tuple(config.data.sources), layout.data)
        tables = plan_tables(config, layout, rank["place"], workload, device)
        traffic = plan_communication(config, layout, rank["place"], workload, tables)
        planned = {(one.group, one.operation): (one.count, one.num_bytes) for one in traffic}
        assert planned == rank["messages"], rank["place"]


def test_memory_is_what_is_held(run):
    config, ranks = run
    layout, device = layout_of(config, len(ranks)), find_device("cpu", world_size=len(ranks))
    for rank in ranks:
        place = rank["place"]
        for chunk, names in enumerate(rank["names"]):
            parameters = chunk_parameters(config, layout, stage=place.stage, chunk=chunk)
            assert [(one.name, one.shape) for one in parameters] == names
        workload = workload_of(rank["plan"], tuple(config.data.sources), layout.data)
        tables = plan_tables(config, layout, place, workload, device)
        memory = plan_memory(config, layout, place, workload, tables, is_gpu=False)
        planned = memory.by_component()
        assert {name: planned[name] for name in rank["bytes"]} == rank["bytes"], place
        kept = rank["kept"] + _held_by_the_schedule(config, layout, place, sum(memory.in_flight))
        assert memory.activations == pytest.approx(kept, rel=MEMORY_TOLERANCE), place
        assert memory.total == pytest.approx(rank["peak"], rel=MEMORY_TOLERANCE), place
        print(f"{place}: {memory.activations / kept - 1:+.2%} {memory.total / rank['peak'] - 1:+.2%}")


def _held_by_the_schedule(config: Any, layout: Any, place: Place, in_flight: int) -> int:
    """Returns bytes that live as long as a microbatch but that autograd does not hold: what a stage sends on, and,
    where layers are computed again, rotary tables, which their checkpoint function keeps."""
    tokens, item = config.data.tokens_per_microbatch, 4 if config.train.precision == "fp32" else 2
    sent = tokens // layout.token_share * config.encoder.hidden_size if place.stage < layout.pipeline - 1 else 0
    rotary = 2 * tokens * config.encoder.head_dim if config.encoder.recompute == "full" else 0
    return in_flight * item * (sent + rotary)
