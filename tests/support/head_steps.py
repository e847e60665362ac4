"""Steps of one Partial-FC objective on any grid of ranks, beside the dense reference of the same step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.heads.class_centers import initial_rows
from megatron_ove.objectives.build import build_objectives
from megatron_ove.objectives.label_slots import draw_label_slots
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.objectives.partial_fc import PartialFC
from megatron_ove.outputs import VisionFeatures
from megatron_ove.parallel.topology import ParallelTopology, initialize_topology
from tests.support.reference_heads import dense_sample_losses

SEED, NAME = 11, "tags"
SOURCES = ("other", "pages")
# A step's samples: replica -> microbatch -> sample indices. `-1` is a sample of another source.
Layout = Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Case:
    """One step, independent of how it is spread over ranks."""

    config: PartialFCConfig
    embeddings: Tensor
    labels: Tensor
    seeds: Tensor
    optim: ClassCenterOptimConfig = field(default_factory=lambda: ClassCenterOptimConfig(clip_grad_norm=0.0))
    step: int = 3

    @property
    def num_items(self) -> int:
        return int((self.labels >= 0).any(1).sum())


def make_case(
    *,
    num_classes: int = 37,
    num_samples: int = 9,
    embedding_size: int = 6,
    width: int = 6,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random step with repeated, missing and no labels; few dimensions, so that the filter has something to do."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num_samples, width), generator=generator, dtype=torch.int32)
    labels[1, 1] = labels[1, 0]
    labels[2, 2:] = -1
    labels[4] = -1
    optim = options.pop("optim", ClassCenterOptimConfig(clip_grad_norm=0.0))
    defaults: dict[str, Any] = {
        "source": "pages",
        "num_classes": num_classes,
        "labels_per_step": 4,
        "sample_rate": 1.0,
        "interclass_filter": 0.4,
        "logit_scale": 16.0,
        "chunk_size": 5,
    }
    return Case(
        config=PartialFCConfig(**(defaults | options)),
        embeddings=torch.randn(num_samples, embedding_size, generator=generator),
        labels=labels,
        seeds=torch.randint(0, 2**62, (num_samples,), generator=generator),
        optim=optim,
    )


def make_batch(case: Case, samples: Sequence[int]) -> Batch:
    """A microbatch of one-patch samples; -1 stands for a sample that the objective must not see."""
    real = [index for index in samples if index >= 0]
    seeds = torch.tensor([int(case.seeds[index]) if index >= 0 else 5 for index in samples], dtype=torch.int64)
    return Batch(
        positions=torch.zeros(len(samples) + 2, 3, dtype=torch.int32),
        cu_seqlens=torch.arange(len(samples) + 1, dtype=torch.int32),
        source_index=torch.tensor([int(index >= 0) for index in samples], dtype=torch.int32),
        source_names=SOURCES,
        sample_keys=tuple(f"page-{index}" for index in samples),
        sample_seeds=seeds,
        labels={"pages": case.labels[torch.tensor(real, dtype=torch.int64)]},
    )


def build(case: Case, topology: ParallelTopology) -> ObjectiveSet:
    return build_objectives(
        {NAME: case.config},
        topology=topology,
        embedding_size=case.embeddings.shape[1],
        seed=SEED,
        optim=case.optim,
    )


def table_of(objectives: ObjectiveSet) -> Any:
    objective = objectives[NAME]
    assert isinstance(objective, PartialFC)
    return objective.centers


def run_microbatches(
    case: Case, objectives: ObjectiveSet, layout: Layout, topology: ParallelTopology
) -> tuple[dict[int, Tensor], float, Mapping[str, float]]:
    """begin_step, then forward and backward as the training step does them.

    Returns:
        (sample -> gradient of its embedding, this replica's part of the step's loss, sums and counts of metrics).
    """
    mine = layout[topology.data_rank]
    batches = [make_batch(case, samples) for samples in mine]
    objectives.begin_step(case.step, batches)
    scales = {NAME: len(batches) * topology.data_size / case.num_items}
    gradients: dict[int, Tensor] = {}
    loss = 0.0
    metrics: dict[str, float] = {}
    for samples, batch in zip(mine, batches, strict=True):
        pooled = torch.stack([case.embeddings[index] for index in samples]) if samples else case.embeddings[:0].clone()
        pooled.requires_grad_()
        features = VisionFeatures(tokens=torch.empty(0), pooled=pooled, cu_seqlens=batch.cu_seqlens)
        output = objectives.forward(features, batch, scales)
        (output.loss / len(batches)).backward()  # as megatron-core divides it
        assert pooled.grad is not None
        for row, index in enumerate(samples):
            if index >= 0:
                gradients[index] = pooled.grad[row] / topology.data_size  # as DistributedDataParallel averages it
            else:
                assert not pooled.grad[row].any()
        loss += float(output.loss.detach()) / len(batches) / topology.data_size
        for name, (total, count) in output.metrics.items():
            metrics[name + ".sum"] = metrics.get(name + ".sum", 0.0) + float(total)
            metrics[name + ".count"] = metrics.get(name + ".count", 0.0) + float(count)
    return gradients, loss, metrics


def start(tensor_size: int) -> ParallelTopology:
    return initialize_topology(ParallelConfig(tensor_model_parallel_size=tensor_size), seed=0)


def step_on_rank(rank: int, world_size: int, case: Case, layout: Layout, tensor_size: int, lr: float) -> dict[str, Any]:
    """One whole step on one rank; returns plain results."""
    topology = start(tensor_size)
    objectives = build(case, topology)
    gradients, loss, metrics = run_microbatches(case, objectives, layout, topology)
    table = table_of(objectives)
    norm = objectives.row_gradient_norms()[NAME]
    rows = table._rows + table.first_class
    row_gradient = table._gradient.clone()
    active_sets = [table.first_class + objectives[NAME]._active.rows[part] for part in objectives[NAME]._active.members]
    objectives.apply_update(lr)
    return {
        "gradients": gradients,
        "loss": loss,
        "metrics": metrics,
        "norm": float(norm),
        "rows": rows,
        "row_gradient": row_gradient,
        "sets": active_sets,
        "first": table.first_class,
        "weight": table.weight,
        "exp_avg": table.exp_avg,
        "exp_avg_sq": table.exp_avg_sq,
        "steps": table.steps,
        "data_rank": topology.data_rank,
        "tensor_rank": topology.tensor_rank,
    }


@dataclass(frozen=True)
class Reference:
    loss: float
    embedding_gradient: Tensor
    center_gradient: Tensor
    centers: Tensor
    drawn: Tensor


def dense_step(case: Case, classes_per_slot: Sequence[Tensor] | None = None) -> Reference:
    """The step's loss (mean over labelled samples) and gradients in float64."""
    size = case.embeddings.shape[1]
    centers = initial_rows(SEED, NAME, 0, case.config.num_classes, size).double().requires_grad_()
    embeddings = case.embeddings.double().requires_grad_()
    drawn = draw_label_slots(case.labels, case.seeds, case.config.labels_per_step)
    losses = dense_sample_losses(embeddings, centers, drawn, case.config, classes_per_slot)
    loss = losses.sum() / case.num_items
    loss.backward()
    assert embeddings.grad is not None and centers.grad is not None
    return Reference(float(loss.detach()), embeddings.grad, centers.grad, centers.detach(), drawn)


@dataclass(frozen=True)
class Gathered:
    """Results of all ranks put together."""

    loss: float
    embedding_gradient: Tensor
    row_gradient: Tensor
    sets: list[Tensor]
    weight: Tensor
    norms: list[float]


def gather_results(case: Case, results: Sequence[Mapping[str, Any]]) -> Gathered:
    """Joins what the ranks returned and checks that tensor-parallel ranks agree bit for bit."""
    embedding_gradient = torch.zeros_like(case.embeddings)
    by_replica: dict[int, Mapping[str, Any]] = {}
    for result in results:
        first = by_replica.setdefault(result["data_rank"], result)
        assert result["loss"] == first["loss"]
        for index, gradient in result["gradients"].items():
            assert torch.equal(gradient, first["gradients"][index])
            embedding_gradient[index] = gradient
    is_stage_wide = case.config.class_group == "stage"
    owners = [result for result in results if is_stage_wide or result["data_rank"] == 0]
    row_gradient = torch.zeros(case.config.num_classes, case.embeddings.shape[1])
    for result in owners:
        row_gradient[result["rows"]] = result["row_gradient"]
    return Gathered(
        loss=sum(result["loss"] for result in by_replica.values()),
        embedding_gradient=embedding_gradient,
        row_gradient=row_gradient,
        sets=[torch.cat(parts) for parts in zip(*(result["sets"] for result in owners), strict=True)],
        weight=torch.cat([result["weight"] for result in sorted(owners, key=lambda item: item["first"])]),
        norms=[result["norm"] for result in results],
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference, relative to the largest entry: rounding of sums does not shrink with small entries."""
    scale = expected.abs().max().clamp(min=1e-12)
    difference = (actual.double() - expected.double()).abs().max() / scale
    assert difference <= tolerance, f"relative difference {float(difference):.2e} exceeds {tolerance:.0e}"
