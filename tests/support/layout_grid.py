"""Runs of one small model under many layouts, several of them in one group of processes, and what they computed.

Whole tensors are put together from the shards of all ranks, so a wrong slice or a missing one shows.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.distributed import run_distributed
from tests.support.tiny_run import check, tiny_config

Change = Callable[[Any, Any], None]
NUM_STEPS = 20
"""What every run's schedule of the learning rate is made for; "stop_after" ends one earlier."""
# A gradient this much smaller than the largest one is rounding noise, and is compared at this scale instead.
NOISE_FLOOR = 1e-4
# Four heads of 32 for four tensor ranks.
ENCODER = {"hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 192}


@dataclass
class Shards:
    """One rank's parts of tensors: name -> (dim along which it is a part, -1 = whole; place along it; data).

    Attributes:
        gradients: of the encoder's parameters, by step and global name, before clipping.
        rows: of the tables' gradients, by step and objective; place = their rows of the whole table.
        tables: centers, second moments and step counts at the end; place = first row.
        weights: of the encoder at the end, by global name.
    """

    gradients: dict[int, dict[str, tuple[int, int, Tensor]]] = field(default_factory=dict)
    rows: dict[int, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    tables: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    weights: dict[str, tuple[int, int, Tensor]] = field(default_factory=dict)
    optimizer_dtypes: set[torch.dtype] = field(default_factory=set)


@dataclass
class RunRecord:
    """What a run computed, whole.

    Attributes:
        losses: of each step: losses and gradient norms by name.
        gradients: step -> global name or `<objective> rows` -> tensor.
        tables: `<objective>.<part>` -> tensor.
        weights: global name -> tensor, after checking that all copies are equal.
        optimizer_dtypes: of what AdamW updates, over all ranks.
    """

    losses: list[dict[str, float]]
    gradients: dict[int, dict[str, Tensor]]
    tables: dict[str, Tensor]
    weights: dict[str, Tensor]
    optimizer_dtypes: set[torch.dtype]


def run_layouts(
    sources: dict[str, str],
    folder: Path,
    world_size: int,
    layouts: dict[str, dict[str, Any]],
    *,
    precision: str = "fp32",
    sample_rate: float = 1.0,
    prepare: Callable[[], None] | None = None,
    change: Change | None = None,
    timeout_s: float = 280,
) -> dict[str, RunRecord]:
    """Trains under every layout in one group of processes.

    Args:
        sources: from `write_tiny_sources`.
        folder: of the run folders.
        world_size: processes.
        layouts: name -> fields of the parallel section; "layers", "tokens", "class_group" and "stop_after" go to other
            sections, and "run" names the run, else the layout does: several in turn may continue one.
        precision: fp32 or bf16.
        sample_rate: of the tables.
        prepare: a top-level function, called in each process before anything is built.
        change: a top-level function, called with each trainer and topology before it runs.
        timeout_s: for all of them.
    """
    runs = {name: folder / layout.get("run", name) for name, layout in layouts.items()}
    configs = {
        name: grid_config(sources, runs[name], layout, precision=precision, sample_rate=sample_rate)
        for name, layout in layouts.items()
    }
    ranks = run_distributed(_walk, world_size, configs, prepare, change, timeout_s=timeout_s)
    records = {}
    for name in layouts:
        try:
            records[name] = _put_together(runs[name], [rank[name] for rank in ranks])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return records


def grid_config(
    sources: dict[str, str], run_dir: Path, layout: dict[str, Any], *, precision: str, sample_rate: float
) -> dict[str, Any]:
    """Returns the configuration of one run as plain values."""
    layout = {name: value for name, value in layout.items() if name != "run"}
    layers, tokens = layout.pop("layers", 4), layout.pop("tokens", 48)
    class_group, stop_after = layout.pop("class_group", "stage"), layout.pop("stop_after", None)
    data = tiny_config(
        sources,
        run_dir,
        sample_rate=sample_rate,
        encoder={**ENCODER, "num_layers": layers},
        parallel={"timeout_s": 60, **layout},
        # Slow enough that rounding in the first steps does not grow to 1e-5 of the gradients by the last.
        optim={"lr": 1e-4, "schedule": {"warmup_steps": 2}, "class_centers": {"lr_multiplier": 4.0}},
        # Few and large enough for several microbatches per replica; interleaving needs a multiple of the stages.
        train={"num_steps": NUM_STEPS, "global_batch_size": 16, "precision": precision, "log_interval_steps": 1},
    )
    data["train"]["stop_after_steps"] = stop_after
    data["data"]["tokens_per_microbatch"] = tokens
    for objective in data["objectives"].values():
        objective["class_group"] = class_group
    return data


def _walk(
    rank: int,
    world_size: int,
    configs: dict[str, dict[str, Any]],
    prepare: Callable[[], None] | None,
    change: Change | None,
) -> dict[str, Shards]:
    from megatron_ove.parallel.topology import destroy_topology, initialize_topology

    if prepare is not None:
        prepare()

    results = {}
    for name, data in configs.items():
        if not dist.is_initialized():
            store = dist.FileStore(f"{data['run_dir']}.{name}.rendezvous", world_size)
            timeout = timedelta(seconds=data["parallel"]["timeout_s"])
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        config = check(data)
        results[name] = _train_and_watch(config, initialize_topology(config.parallel, seed=config.seed), change)
        gc.collect()
        dist.barrier()  # nobody leaves while a peer still talks to it
        destroy_topology()
    return results


def _train_and_watch(config: Any, topology: Any, change: Change | None) -> Shards:
    """Runs to the end; keeps gradients before the updates of the first and of the last step of all."""
    from megatron_ove.training.trainer import Trainer

    trainer: Any = Trainer(config, topology)
    shards = Shards()
    end = min(NUM_STEPS, trainer.state.step + (config.train.stop_after_steps or NUM_STEPS))
    watched_steps = (0, end - 1)
    update = trainer.optimizer.step

    def watched(lr: float) -> None:
        step = trainer.state.step
        if step in watched_steps:
            shards.gradients[step] = _encoder_shards(trainer, topology, _gradients(trainer, topology))
            shards.rows[step] = {name: _row_gradient(trainer.objectives[name].centers) for name in _tables(trainer)}
        update(lr)

    trainer.optimizer.step = watched
    if change is not None:
        change(trainer, topology)
    trainer.run()
    weights = {parameter: parameter.detach() for chunk in trainer.chunks for parameter in chunk.parameters()}
    shards.weights = _encoder_shards(trainer, topology, weights)
    for name in _tables(trainer):
        centers = trainer.objectives[name].centers
        for part in ("weight", "exp_avg_sq", "steps"):
            shards.tables[f"{name}.{part}"] = centers.first_row, getattr(centers, part).clone()
    groups = trainer.optimizer.param_groups
    shards.optimizer_dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
    return shards


def _tables(trainer: Any) -> Iterable[str]:
    return trainer.objectives or ()


def _gradients(trainer: Any, topology: Any) -> dict[Tensor, Tensor]:
    """Returns each parameter's whole gradient; under the distributed optimizer a rank has a share of each bucket."""
    found = {}
    for buffer in (buffer for chunk in trainer.chunks for buffer in chunk.buffers):
        whole = []
        for bucket in buffer.buckets:
            data = bucket.grad_data.clone()
            if buffer.ddp_config.use_distributed_optimizer and topology.data_size > 1:
                share = data.view(topology.data_size, -1)[topology.data_rank].clone()
                dist.all_gather_into_tensor(data, share, group=topology.data_group)
            whole.append(data)
        gradients = torch.cat(whole)
        # Not `bucket.param_to_index`, which leaves out the gaps between aligned parameters.
        for parameter, (start, stop, _) in buffer.param_index_map.items():
            found[parameter] = gradients[start:stop].view(parameter.shape)
    return found


def _encoder_shards(trainer: Any, topology: Any, tensors: dict[Tensor, Tensor]) -> dict[str, tuple[int, int, Tensor]]:
    from megatron_ove.model.parameter_names import global_name
    from megatron_ove.training.build_model import model_of

    shards = {}
    for chunk in trainer.chunks:
        encoder = model_of(chunk).encoder
        for name, parameter in encoder.named_parameters():
            dim = parameter.partition_dim if parameter.tensor_model_parallel and topology.tensor_size > 1 else -1
            entry = (dim, topology.tensor_rank, tensors[parameter].clone())
            shards[global_name(name, encoder.layer_offset)] = entry
    return shards


def _row_gradient(centers: Any) -> tuple[Tensor, Tensor]:
    rows = centers.step_table.active.rows
    is_real = rows < centers.num_rows
    return rows[is_real] + centers.first_row, centers.gradient_of_rows()[is_real].clone()


def _put_together(run_dir: Path, ranks: list[Shards]) -> RunRecord:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [{name: row[name] for name in row if name.split("/")[0] in ("loss", "grad_norm")} for row in lines]
    gradients = {
        step: _whole(f"gradients of step {step}", [rank.gradients[step] for rank in ranks])
        | _whole_rows([rank.rows[step] for rank in ranks])
        for step in ranks[0].gradients
    }
    weights = _whole("weights", [rank.weights for rank in ranks])
    dtypes = set().union(*(rank.optimizer_dtypes for rank in ranks))
    return RunRecord(losses, gradients, _whole_tables([rank.tables for rank in ranks]), weights, dtypes)


def _whole(what: str, ranks: list[dict[str, tuple[int, int, Tensor]]]) -> dict[str, Tensor]:
    """Joins the parts of tensor-parallel ranks; what several ranks hold must be equal to the bit."""
    parts: dict[str, dict[int, Tensor]] = {}
    dims: dict[str, int] = {}
    for shards in ranks:
        for name, (dim, place, data) in shards.items():
            dims[name] = dim
            known = parts.setdefault(name, {}).setdefault(place if dim >= 0 else 0, data)
            difference = float((known.float() - data.float()).abs().max())
            assert torch.equal(known, data), f"{what}: {name} differs by {difference} between ranks that hold the same"
    return {
        name: found[0] if dims[name] < 0 else torch.cat([found[place] for place in sorted(found)], dim=dims[name])
        for name, found in parts.items()
    }


def _whole_rows(ranks: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """Returns [active rows, 1 + e]: rows of the whole table, and their gradients, in order."""
    whole = {}
    for name in {name for shards in ranks for name in shards}:
        held = [shards[name] for shards in ranks if name in shards]
        rows, order = torch.cat([rows for rows, _ in held]).unique(return_inverse=True)
        data = torch.cat([data for _, data in held])
        table = torch.full((len(rows), data.shape[1]), torch.nan)
        table[order] = data
        assert torch.equal(table[order], data), f"row gradients of {name} differ between ranks that share the rows"
        whole[f"{name} rows"] = torch.cat([rows[:, None].float(), table], dim=1)
    return whole


def _whole_tables(ranks: list[dict[str, tuple[int, Tensor]]]) -> dict[str, Tensor]:
    whole = {}
    for name in {name for shards in ranks for name in shards}:
        parts: dict[int, Tensor] = {}
        for shards in ranks:
            if name in shards and len(shards[name][1]):
                first, data = shards[name]
                assert torch.equal(parts.setdefault(first, data), data), f"{name} differs between its replicas"
        whole[name] = torch.cat([parts[first] for first in sorted(parts)])
    return whole


def compare_losses(record: RunRecord, reference: RunRecord) -> float:
    """Returns the largest relative difference of any loss or gradient norm in any step."""
    assert [set(row) for row in record.losses] == [set(row) for row in reference.losses]
    return max(
        abs(row[name] - expected[name]) / abs(expected[name])
        for row, expected in zip(record.losses, reference.losses, strict=True)
        for name in expected
    )


def compare_gradients(record: RunRecord, reference: RunRecord) -> dict[tuple[int, str], float]:
    """Returns, by step and tensor, the L2 norm of the difference over that of the tensor."""
    found = {}
    for step in record.gradients:
        gradients = reference.gradients[step]
        assert record.gradients[step].keys() == gradients.keys()
        largest = max(float(data.norm()) for name, data in gradients.items() if not name.endswith(" rows"))
        for name, expected in gradients.items():
            got = record.gradients[step][name]
            assert got.shape == expected.shape, f"step {step}, {name}"
            if name.endswith(" rows"):
                assert torch.equal(got[:, 0], expected[:, 0]), f"step {step}, {name}: others are active"
                got, expected = got[:, 1:], expected[:, 1:]
            found[step, name] = float((got - expected).norm()) / max(float(expected.norm()), NOISE_FLOOR * largest)
    return found
