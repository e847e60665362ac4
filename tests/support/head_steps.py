"""Steps of one Partial-FC objective on any grid of ranks, beside the dense reference of the same step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack, Samples
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.heads.class_centers import initial_rows
from megatron_ove.kinds import load_kinds
from megatron_ove.objectives.build import build_objectives
from megatron_ove.objectives.label_slots import draw_label_slots
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.objectives.partial_fc import PartialFC
from megatron_ove.outputs import VisionFeatures
from megatron_ove.parallel.class_order import rows_of_classes
from megatron_ove.parallel.topology import ParallelTopology, initialize_topology
from tests.support.objective_steps import begin
from tests.support.reference_heads import center_dense, dense_sample_losses

SEED, NAME = 11, "tags"
SOURCES = ("other", "pages", "scans")
# A step's samples: replica -> microbatch -> sample indices. `-1` is a sample of another source.
Layout = Sequence[Sequence[Sequence[int]]]
EXACT_OPTIM = ClassCenterOptimConfig(
    clip_grad_norm=0.0, first_moment="float32", second_moment="element", lr_scaling="none"
)


@dataclass(frozen=True)
class Case:
    """One step, independent of how it is spread over ranks."""

    config: PartialFCConfig
    embeddings: Tensor
    labels: Tensor
    seeds: Tensor
    optim: ClassCenterOptimConfig = EXACT_OPTIM
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
    optim = options.pop("optim", EXACT_OPTIM)
    defaults: dict[str, Any] = {
        "kind": "partial_fc",
        "source": "pages",
        "num_classes": num_classes,
        "labels_per_step": 4,
        "sample_rate": 1.0,
        "co_positives": "negative",
        "compute_dtype": "float32",
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


def make_batch(case: Case, samples: Sequence[int], names: Sequence[str] = (NAME,)) -> Batch:
    """A microbatch of one-patch samples; -1 stands for a sample that the objectives `names` must not see."""
    real = [index for index in samples if index >= 0]
    seeds = torch.tensor([int(case.seeds[index]) if index >= 0 else 5 for index in samples], dtype=torch.int64)
    positions = torch.zeros(len(samples) + 2, 3, dtype=torch.int32)
    wanted = [SOURCES.index(name) for name in case.config.sources]  # of several, the samples come in turn
    source = torch.tensor([wanted[index % len(wanted)] if index >= 0 else 0 for index in samples], dtype=torch.int32)
    known = Samples.of_one_source("pages", tuple(f"page-{index}" for index in samples), seeds)
    return Batch(
        {MAIN_PACK: PatchPack.of_whole_samples(positions, torch.arange(len(samples) + 1, dtype=torch.int32))},
        replace(known, source_names=SOURCES, source=source),
        dict.fromkeys(names, case.labels[torch.tensor(real, dtype=torch.int64)]),
    )


def make_features(pooled: Tensor, batch: Batch) -> VisionFeatures:
    """The features of a microbatch of which only the embeddings, [b, h], are looked at."""
    pack = batch.main
    return VisionFeatures(pooled[:0], pack.cu_seqlens, pack.grids, pack.sample, pooled)


def build(case: Case, topology: ParallelTopology) -> ObjectiveSet:
    return build_objectives(
        {NAME: case.config},
        kinds=load_kinds(),
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
    """Begins the step, then forward and backward as the training step does them.

    Returns:
        (sample -> gradient of its embedding, this replica's part of the step's loss, sums and counts of metrics).
    """
    mine = layout[topology.data_rank]
    batches = [make_batch(case, samples) for samples in mine]
    begin(objectives, case.step, batches)
    scales = {NAME: len(batches) * topology.data_size / case.num_items}
    gradients: dict[int, Tensor] = {}
    loss = 0.0
    metrics: dict[str, float] = {}
    for samples, batch in zip(mine, batches, strict=True):
        pooled = torch.stack([case.embeddings[index] for index in samples]) if samples else case.embeddings[:0].clone()
        pooled.requires_grad_()
        output = objectives.forward(make_features(pooled, batch), batch, scales)
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
    return one_step(case, layout, start(tensor_size), lr)


def steps_on_rank(
    rank: int, world_size: int, cases: Sequence[Case], layout: Layout, tensor_size: int, lr: float
) -> list[dict[str, Any]]:
    """`step_on_rank` of many cases, without starting processes for each."""
    topology = start(tensor_size)
    return [one_step(case, layout, topology, lr) for case in cases]


def one_step(case: Case, layout: Layout, topology: ParallelTopology, lr: float) -> dict[str, Any]:
    objectives = build(case, topology)
    gradients, loss, metrics = run_microbatches(case, objectives, layout, topology)
    table = table_of(objectives)
    norm = objectives.gradient_norms()[NAME]
    active = table.step_table.active
    rows = active.rows + table.first_row
    row_gradient = table.gradient_of_rows()
    objectives.step(lr)
    return {
        "gradients": gradients,
        "loss": loss,
        "metrics": metrics,
        "norm": float(norm),
        "rows": rows,
        "row_gradient": row_gradient,
        "set_weights": active.weights,
        "first": table.first_row,
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


def dense_step(
    case: Case,
    weights: Tensor | None = None,
    centers: Tensor | None = None,
    groups: Sequence[Sequence[int]] = (),
) -> Reference:
    """The step's loss (mean over labelled samples) and gradients in float64.

    Args:
        case: the step.
        weights: as `dense_sample_losses` takes them.
        centers: [c, e], in table order; None = a fresh table.
        groups: samples that share a microbatch, for `centering`.
    """
    if centers is None:
        centers = initial_rows(SEED, NAME, 0, case.config.num_classes, case.embeddings.shape[1])
    centers = centers.detach().double().requires_grad_()
    embeddings = case.embeddings.double().requires_grad_()
    drawn = draw_label_slots(case.labels, case.seeds, case.config.labels_per_step)
    drawn = rows_of_classes(drawn, case.config.num_classes)
    is_labelled = (drawn >= 0).any(1)
    met = embeddings
    if case.config.centering == "embeddings":
        met = center_dense(embeddings, groups, is_labelled)
    losses = dense_sample_losses(met, centers, drawn, case.config, weights)
    loss = losses.sum() / case.num_items
    loss.backward()
    assert embeddings.grad is not None and centers.grad is not None
    gradient = embeddings.grad
    if case.config.centering == "gradient":
        gradient = center_dense(gradient, groups, is_labelled)
    return Reference(float(loss.detach()), gradient, centers.grad, centers.detach(), drawn)


@dataclass(frozen=True)
class Gathered:
    """Results of all ranks put together.

    Attributes:
        set_weights: [c, s], what every row counts in every class set; 0 for rows that are not active.
        slot_weights: [k, c], the same for every label slot.
        is_active: [c] bool.
    """

    loss: float
    embedding_gradient: Tensor
    row_gradient: Tensor
    set_weights: Tensor
    slot_weights: Tensor
    is_active: Tensor
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
    set_weights = torch.zeros(case.config.num_classes, owners[0]["set_weights"].shape[1])
    is_active = torch.zeros(case.config.num_classes, dtype=torch.bool)
    for result in owners:
        assert not is_active[result["rows"]].any()
        row_gradient[result["rows"]] = result["row_gradient"]
        set_weights[result["rows"]] = result["set_weights"]
        is_active[result["rows"]] = True
    return Gathered(
        loss=sum(result["loss"] for result in by_replica.values()),
        embedding_gradient=embedding_gradient,
        row_gradient=row_gradient,
        set_weights=set_weights,
        slot_weights=set_weights.T[_set_of_slots(case.config, set_weights.shape[1])],
        is_active=is_active,
        weight=torch.cat([result["weight"] for result in sorted(owners, key=lambda item: item["first"])]),
        norms=[result["norm"] for result in results],
    )


def _set_of_slots(config: PartialFCConfig, num_sets: int) -> list[int]:
    """Slots are dealt out to the sets in runs; slots at the end, when no sample has so many labels, have no set."""
    wanted = {"per_label": config.labels_per_step, "shared": 1}.get(config.negatives, config.negative_groups or 0)
    places = [0] * config.labels_per_step
    for index in range(wanted):
        for slot in range(index * config.labels_per_step // wanted, (index + 1) * config.labels_per_step // wanted):
            places[slot] = min(index, num_sets - 1)
    return places


def check_against_dense(
    case: Case, joined: Gathered, *, loss: float = 1e-6, gradient: float = 1e-5, reference: Reference | None = None
) -> Reference:
    """Compares a step with the dense softmax over the same classes per slot; tolerances are relative."""
    if reference is None:
        reference = dense_step(case, joined.slot_weights)
    difference = abs(joined.loss - reference.loss)
    assert difference <= loss * abs(reference.loss), f"loss {joined.loss} instead of {reference.loss}"
    assert_close(joined.embedding_gradient, reference.embedding_gradient, gradient)
    assert_close(joined.row_gradient, reference.center_gradient, gradient)
    norm = float(reference.center_gradient.norm())
    assert all(abs(each - norm) <= gradient * norm for each in joined.norms), (joined.norms, norm)
    return reference


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference, relative to the largest entry: rounding of sums does not shrink with small entries."""
    scale = expected.abs().max().clamp(min=1e-12)
    difference = (actual.double() - expected.double()).abs().max() / scale
    assert difference <= tolerance, f"relative difference {float(difference):.2e} exceeds {tolerance:.0e}"
