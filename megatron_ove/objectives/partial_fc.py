"""`PartialFC`: cluster discrimination. Each drawn label of a sample is one margin softmax over sampled classes.

A step's labels are known to all replicas before it begins, and with them every rank's active rows, chosen on the host
ahead of the step. A microbatch then costs three collectives for all heads together: a gather of embeddings, one sum of
softmax statistics, and a reduce-scatter of gradients. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import normalize

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.errors import CheckpointError, ConfigError
from megatron_ove.heads import triton_backend
from megatron_ove.heads.active_classes import (
    NegativeDraw,
    choose_active_rows,
    collect_positives,
    draw_negatives,
    weigh_active_rows,
)
from megatron_ove.heads.centering import EmbeddingMean, center_gradient, centered_directions
from megatron_ove.heads.class_centers import MOMENTS, ClassCenters
from megatron_ove.heads.embedding_health import embedding_health
from megatron_ove.heads.fused_softmax import MOST_LABELS, MOST_SETS, FusedSoftmax
from megatron_ove.heads.label_ranks import each_label_once, label_ranks, retrieval_sums
from megatron_ove.heads.margin_softmax import LARGEST_FP32_SCALE
from megatron_ove.heads.sampled_softmax import HeadShare, SampledSoftmax, exchange_statistics
from megatron_ove.objectives.base import Objective, ObjectiveContext
from megatron_ove.objectives.chance import margin_softmax_of
from megatron_ove.objectives.items import Items, SampleItems
from megatron_ove.objectives.label_check import find_bad_label
from megatron_ove.objectives.label_slots import draw_label_slots
from megatron_ove.objectives.partial_fc_step import CoPositives, MicrobatchPlan, StepPlan, plan_microbatches
from megatron_ove.optim.updates import RowTable
from megatron_ove.outputs import LossTerms, VisionFeatures
from megatron_ove.parallel.class_order import rows_of_classes
from megatron_ove.parallel.collectives import gather_replica_rows, sum_gradient_over_group
from megatron_ove.parallel.host_tensors import host_tensor
from megatron_ove.parallel.random import stateless_seed
from megatron_ove.parallel.row_blocks import concatenate_ranges
from megatron_ove.parallel.topology import ParallelTopology

if TYPE_CHECKING:
    from megatron_ove.data.sample_reader import SampleReader


class PartialFC(Objective):
    """Margin softmax over sampled class centers, sharded over `class_group`."""

    def __init__(
        self,
        name: str,
        config: PartialFCConfig,
        *,
        topology: ParallelTopology,
        embedding_size: int,
        seed: int,
        optim: ClassCenterOptimConfig,
        dtype: torch.dtype,
        items: Items | None = None,
    ) -> None:
        """`items` is what it embeds; None = samples."""
        self.name = name
        self.sources = config.sources
        self._items: Items = items or SampleItems(config.sources)
        self.message_width = config.labels_per_step * self._items.per_sample
        self._config = config
        self._topology = topology
        self._seed = seed
        # A table over the whole stage sees the samples of all replicas. A table over tensor ranks exists once per
        # replica and sees that replica's samples only; its gradients are summed over the replicas instead.
        self._is_stage_wide = config.class_group == "stage"
        self._corrects_sampling = config.sampling_correction == "logq"
        self._is_fused = _uses_triton(name, config, optim, topology.device)
        self._softmax = margin_softmax_of(config)
        self.centers = ClassCenters(
            name,
            num_classes=config.table_size,
            embedding_size=embedding_size,
            seed=seed,
            optim=optim,
            class_group=topology.class_group if self._is_stage_wide else topology.tensor_group,
            replica_group=None if self._is_stage_wide else topology.data_group,
            gradient_scale=1 / topology.data_size,
            device=topology.device,
            compute_dtype=_compute_dtype(config, topology.device, dtype),
            chunk_size=config.chunk_size,
            is_fused=self._is_fused,
        )
        self._mean: EmbeddingMean | None = None
        if config.centering == "embeddings":
            replicas = None if self._is_stage_wide else topology.data_group
            self._mean = EmbeddingMean(embedding_size, topology.device, replicas)
        self._plans: dict[int, MicrobatchPlan] = {}

    def tables(self) -> Sequence[RowTable]:
        return (self.centers,)

    def modules(self) -> Mapping[str, nn.Module]:
        return self._items.modules()

    def collate(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> Any:
        return self._items.collate(samples, pack, reader)

    def num_items(self, batch: Batch) -> int:
        """Returns the number of items that have a label."""
        return int((self._labels_of(batch) >= 0).any(1).sum())

    def find_mistake(self, batches: Sequence[Batch]) -> str:
        of_samples = []
        for batch in batches:
            labels = self._labels_of(batch)  # [m * q, L]
            items = self._items.per_sample
            of_samples.append(labels.reshape(len(labels) // items, items * labels.shape[1]))
        return find_bad_label(self.name, self.sources, self._config.table_size, batches, of_samples)

    def message(self, batches: Sequence[Batch]) -> np.ndarray:
        """Returns the class ids of the labels that are drawn, of all items of a sample one after the other,
        [n_own, q * k] int32, -1 = none."""
        drawn = [self._draw_slots(batch) for batch in batches]
        return torch.cat(drawn).reshape(-1, self.message_width).numpy()

    def prepare_step(
        self, step: int, batches: Sequence[Batch], sample_counts: np.ndarray, messages: np.ndarray
    ) -> StepPlan:
        config, device = self._config, self._topology.device
        messages = messages.reshape(-1, config.labels_per_step)
        sample_counts = sample_counts * self._items.per_sample
        step_labels = rows_of_classes(torch.from_numpy(messages), config.table_size).numpy()  # of all replicas
        draw, set_of_slot = self._draw_class_sets(step, step_labels)
        positives = collect_positives(step_labels, set_of_slot, draw.num_sets)
        order, samples, own = self._order_samples(sample_counts)
        labels = step_labels[order]
        co_positives = None  # with one set for all slots every label is in it
        if config.co_positives == "negative" and draw.num_sets > 1:
            is_drawn, keys = host_tensor(draw.contains(labels), device), host_tensor(positives.keys, device)
            co_positives = CoPositives(is_drawn, keys, 1 / draw.probability if self._corrects_sampling else 1.0)
        return StepPlan(
            draw=draw,
            chosen=choose_active_rows(
                draw, positives, first_row=self.centers.first_row, num_rows=self.centers.num_rows, device=device
            ),
            active_share=draw.share_with(len(positives.rows_between(0, config.table_size))),
            set_of_slot=host_tensor(set_of_slot, device),
            labels=host_tensor(labels, device),
            co_positives=co_positives,
            rows=host_tensor(np.concatenate([self._items.rows(batch).numpy() for batch in batches]), device),
            counts=sample_counts,
            samples=samples,
            own=own,
            samples_of=[batch.samples for batch in batches],
        )

    def begin_step(self, prepared: StepPlan) -> None:
        device = self._topology.device
        active = weigh_active_rows(
            prepared.chosen, prepared.draw, device=device, corrects_sampling=self._corrects_sampling
        )
        self.centers.begin_step(active, prepared.samples, prepared.active_share)
        self._plans = plan_microbatches(prepared, active, self.centers.first_row, device)

    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        return self.forward_together([self], features, batch)[0]

    @classmethod
    def forward_together(
        cls, objectives: Sequence[PartialFC], features: VisionFeatures, batch: Batch
    ) -> list[LossTerms]:
        terms: dict[str, LossTerms] = {}
        for is_stage_wide in (True, False):
            heads = [head for head in objectives if head._is_stage_wide == is_stage_wide]
            if heads:
                terms |= zip((head.name for head in heads), _forward_heads(heads, features, batch), strict=True)
        return [terms[objective.name] for objective in objectives]

    def plan_of(self, batch: Batch) -> MicrobatchPlan:
        """Returns the plan of a microbatch of the step under way."""
        plan = self._plans.get(id(batch.samples))
        if plan is None:
            raise RuntimeError(f"objective '{self.name}' got a batch that was not given to prepare_step")
        return plan

    def before_gather(self, pooled: Tensor) -> Tensor:
        """Returns what is gathered of this replica's [b_own, e] embeddings: their directions unless they are centered,
        for which every rank needs them as they are."""
        return normalize(pooled, dim=1) if self._config.centering == "none" else pooled

    def directions_of(self, gathered: Tensor, plan: MicrobatchPlan) -> Tensor:
        """Returns [b, e] fp32, embeddings as they meet the table, of what `before_gather` returned on all replicas."""
        if self._config.centering == "none":
            return gathered
        is_labelled = (plan.labels >= 0).any(1)
        if self._mean is None:
            return normalize(center_gradient(gathered, is_labelled), dim=1)
        self._mean.observe(gathered, is_labelled)
        return centered_directions(gathered, is_labelled)

    def softmax_of(self, embeddings: Tensor, plan: MicrobatchPlan) -> HeadShare:
        """Returns this rank's share of the softmax of a microbatch whose [b, e] embeddings are gathered."""
        share = FusedSoftmax if self._is_fused else SampledSoftmax
        return share(self.centers.step_table, self._softmax, embeddings, plan.targets)

    def loss_terms(self, negatives: Tensor, target_cosine: Tensor, plan: MicrobatchPlan) -> LossTerms:
        """Returns the loss of this replica's samples.

        Args:
            negatives: [s, b], log-sum-exp of each class set over all ranks.
            target_cosine: [k, b], cosine with each label's center.
            plan: of the microbatch.
        """
        by_slot, target_cosine = negatives.T[:, plan.set_of_slot], target_cosine.T
        losses = self._softmax.sample_losses(by_slot, target_cosine, plan.labels, plan.co_weights)  # [b]
        loss_sum: Tensor = _SumOwn.apply(losses, plan.own)
        is_valid = plan.labels[plan.own] >= 0
        cosine = target_cosine.detach()[plan.own].masked_fill(~is_valid, 0.0)
        metrics = {
            "loss": (loss_sum.detach(), is_valid.any(1).sum().float()),
            "positive_cosine": (cosine.sum(), is_valid.sum().float()),
        }
        return LossTerms(loss_sum, metrics)

    def observe_held_out(self, features: VisionFeatures, batch: Batch) -> Tensor:
        """Returns [m * q, e], a copy of the embeddings of held-out items."""
        found = self._items.embeddings(features, batch, batch.inputs[self.name])
        return found[self._items.rows(batch).to(found.device)].clone()

    def measure_held_out(
        self, observed: Sequence[Tensor], inputs: Sequence[Tensor], sample_counts: np.ndarray
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Returns what `retrieval_sums` says of the labels' ranks among all classes."""
        topology, centers = self._topology, self.centers
        sample_counts = sample_counts * self._items.per_sample
        embeddings = torch.cat(list(observed))
        labels = self._joined([self._items.labels_of(one) for one in inputs], embeddings.device)
        rows = rows_of_classes(labels, centers.num_classes).to(embeddings.device)
        num_own = len(embeddings)
        embeddings = embeddings.float() if self._mean is None else embeddings.float() - self._mean.value
        own = slice(0, num_own)
        if self._is_stage_wide:
            groups = topology.data_group, topology.class_group
            embeddings, rows = (gather_replica_rows(x, *groups, sample_counts[None]) for x in (embeddings, rows))
            first = int(sample_counts[: topology.data_rank].sum())
            own = slice(first, first + num_own)
        ranks = label_ranks(
            embeddings,
            each_label_once(rows),
            weight=centers.weight,
            norms=centers.norms,
            first_row=centers.first_row,
            class_group=centers.class_group,
        )
        return retrieval_sums(ranks[own], centers.num_classes)

    def end_step(self, *, accepted: bool) -> None:
        if self._mean is not None:
            if accepted:
                self._mean.apply_update()
            else:
                self._mean.discard_update()
        self._plans = {}

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        state = self.centers.sharded_state_dict(prefix)
        if self._mean is not None:
            state |= self._mean.sharded_state_dict(prefix, replica=self._topology.class_group.rank())
        return state

    def start_state_dict(self, prefix: str) -> dict[str, Any]:
        state = self.sharded_state_dict(prefix)
        return {key: item for key, item in state.items() if key not in MOMENTS}

    def load_start(self, state: Mapping[str, Any]) -> None:
        self.centers.load_weights(state)
        if self._mean is not None:
            self._mean.load_state(state, self.name)

    def load_exported(self, tensors: Mapping[str, Tensor], *, origin: str) -> None:
        self.centers.load_whole(tensors["class_centers"], origin=origin)
        if self._mean is not None:
            if "embedding_mean" not in tensors:
                raise CheckpointError(
                    f"{origin} has no embedding_mean, because its head was trained without centering: embeddings; set "
                    f"objectives.{self.name}.centering as it was there"
                )
            self._mean.start_with(tensors["embedding_mean"])

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.centers.load_state(state)
        if self._mean is not None:
            self._mean.load_state(state, self.name)

    def _draw_slots(self, batch: Batch) -> Tensor:
        """Returns class ids of the drawn labels, [b_own, k] int32, -1 = none."""
        seeds, labels = self._items.seeds(batch), self._labels_of(batch)
        if labels.shape[0] != seeds.shape[0]:
            raise ValueError(
                f"a batch has {seeds.shape[0]} items for objective '{self.name}' but {labels.shape[0]} rows of labels"
            )
        return draw_label_slots(labels, seeds, self._config.labels_per_step).int()

    def _joined(self, labels: Sequence[Tensor], device: torch.device) -> Tensor:
        """Returns labels one after the other, those with fewer columns filled up with -1: as many on all replicas,
        which tell one another their labels. Collective over them."""
        width = torch.tensor(max(one.shape[1] for one in labels), device=device)
        if self._topology.data_size > 1:
            dist.all_reduce(width, op=dist.ReduceOp.MAX, group=self._topology.data_group)
        return torch.cat([F.pad(one, (0, int(width) - one.shape[1]), value=-1) for one in labels])

    def _labels_of(self, batch: Batch) -> Tensor:
        """Returns [m * q, L] int32, the labels of a microbatch's items."""
        return self._items.labels_of(batch.inputs[self.name])

    def _draw_class_sets(self, step: int, labels: np.ndarray) -> tuple[NegativeDraw, np.ndarray]:
        """Returns (the step's negatives, the class set of each slot [k]); slots without any label have no set.

        Args:
            step: steps done before.
            labels: [n, k], of the whole step and all replicas.
        """
        config = self._config
        has_label = labels >= 0  # [n, k]
        served = [slots for slots in config.slots_of_sets if has_label[:, slots.start : slots.stop].any()]
        set_of_slot = np.zeros(config.labels_per_step, dtype=np.int64)
        key = stateless_seed(self._seed, self.name, "negatives", step)
        if not served:
            return NegativeDraw(config.table_size, 0, 1.0, 1, key), set_of_slot
        draw = draw_negatives(
            config.table_size, probability=config.inclusion_probability, num_sets=len(served), key=key
        )
        if draw.num_sets > 1:
            for index, slots in enumerate(served):
                set_of_slot[slots.start : slots.stop] = index
        return draw, set_of_slot

    def _order_samples(self, counts: np.ndarray) -> tuple[np.ndarray, list[int], list[slice]]:
        """Says which samples meet the table, microbatch by microbatch.

        Args:
            counts: [replicas, microbatches] int64.

        Returns:
            Their places in an array that has one replica's after the other's; their number in each microbatch; and
            which of these are this replica's.
        """
        rank = self._topology.data_rank
        starts = np.cumsum(counts).reshape(counts.shape) - counts
        if not self._is_stage_wide:
            counts, starts, rank = counts[[rank]], starts[[rank]], 0
        first, num_own = counts[:rank].sum(axis=0).tolist(), counts[rank].tolist()
        own = [slice(start, start + size) for start, size in zip(first, num_own, strict=True)]
        return concatenate_ranges(starts.T, counts.T), counts.sum(axis=0).tolist(), own


def _compute_dtype(config: PartialFCConfig, device: torch.device, run_dtype: torch.dtype) -> torch.dtype:
    if config.compute_dtype != "auto":
        return torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32
    # A CPU that only imitates bf16 products is several times slower with them; torch has no public name for this.
    is_native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return run_dtype if is_native else torch.float32


def _uses_triton(name: str, config: PartialFCConfig, optim: ClassCenterOptimConfig, device: torch.device) -> bool:
    """Whether Triton kernels do the work of a head.

    Raises:
        ConfigError: they are asked for and cannot.
    """
    if config.backend == "torch":
        return False
    obstacles = {
        f"labels_per_step = {config.labels_per_step} is more than {MOST_LABELS}": config.labels_per_step > MOST_LABELS,
        f"{len(config.slots_of_sets)} class sets are more than {MOST_SETS}": len(config.slots_of_sets) > MOST_SETS,
        f"logit_scale = {config.logit_scale:g} needs float64 sums": config.logit_scale > LARGEST_FP32_SCALE,
        "optim.class_centers.update: dense has no kernel": optim.update == "dense",
        f"Triton is not installed or does not run on {device}": not triton_backend.is_available(device),
    }
    found = [sentence for sentence, is_there in obstacles.items() if is_there]
    if found and config.backend == "triton":
        raise ConfigError(
            f"objectives.{name}.backend = triton cannot be had: {'; '.join(found)}; set backend: auto, which takes "
            "Triton where it can, or change what is named"
        )
    return device.type == "cuda" and not found if config.backend == "auto" else True


def _forward_heads(heads: Sequence[PartialFC], features: VisionFeatures, batch: Batch) -> list[LossTerms]:
    """Three collectives for heads whose tables are sharded over the same ranks: gather, sum, reduce-scatter."""
    plans = [head.plan_of(batch) for head in heads]
    topology, centers = heads[0]._topology, heads[0].centers
    own = _own_embeddings(heads, plans, features, batch)
    embeddings = torch.cat([head.before_gather(x) for head, x in zip(heads, own, strict=True)])
    if heads[0]._is_stage_wide:
        counts = np.stack([plan.row_counts for plan in plans])
        embeddings = gather_replica_rows(embeddings, topology.data_group, topology.class_group, counts)
    else:
        embeddings = sum_gradient_over_group(embeddings, topology.tensor_group)
    gathered = embeddings.split([len(plan.labels) for plan in plans])
    directions = [head.directions_of(x, plan) for head, x, plan in zip(heads, gathered, plans, strict=True)]
    parts = [head.softmax_of(x, plan) for head, x, plan in zip(heads, directions, plans, strict=True)]
    statistics = exchange_statistics(parts, centers.class_group)
    terms = [head.loss_terms(*pair, plan) for head, pair, plan in zip(heads, statistics, plans, strict=True)]
    return [
        _with_more(term, x[plan.own], head._items.metrics(batch.inputs[head.name]))
        for head, term, x, plan in zip(heads, terms, directions, plans, strict=True)
    ]


def _own_embeddings(
    heads: Sequence[PartialFC], plans: Sequence[MicrobatchPlan], features: VisionFeatures, batch: Batch
) -> list[Tensor]:
    """Returns [b_own, e] fp32 of each head; those of all heads on whole samples are taken in one go."""
    found: dict[str, Tensor] = {}
    of_samples = [pair for pair in zip(heads, plans, strict=True) if isinstance(pair[0]._items, SampleItems)]
    if of_samples:
        rows = [plan.rows for _, plan in of_samples]
        pooled = features.sample_embeddings(batch.num_samples)[torch.cat(rows)].float()
        names = (head.name for head, _ in of_samples)
        found |= zip(names, pooled.split([len(one) for one in rows]), strict=True)
    for head, plan in zip(heads, plans, strict=True):
        if head.name not in found:
            embeddings = head._items.embeddings(features, batch, batch.inputs[head.name])
            found[head.name] = embeddings.float()[plan.rows]
    return [found[head.name] for head in heads]


def _with_more(terms: LossTerms, embeddings: Tensor, counted: Mapping[str, tuple[float, float]]) -> LossTerms:
    on_device = {name: tuple(embeddings.new_tensor(x) for x in pair) for name, pair in counted.items()}
    return replace(terms, metrics={**terms.metrics, **embedding_health(embeddings), **on_device})


class _SumOwn(torch.autograd.Function):
    """Sums this replica's samples. Backward: the same factor for all samples, since every replica's loss counts and
    arrives with an equal one; so each rank has the gradient of all samples for its classes, without an exchange."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, own: slice) -> Tensor:
        ctx.num_samples = losses.shape[0]
        return losses[own].sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.expand(ctx.num_samples), None


def build_partial_fc(name: str, config: PartialFCConfig, context: ObjectiveContext) -> PartialFC:
    """Builds the objective of a section, with a fresh table."""
    items = None
    if config.level == "region":
        from megatron_ove.objectives.regions.region_items import RegionItems

        items = RegionItems(config.sources, config.regions, context)
    return PartialFC(
        name,
        config,
        topology=context.topology,
        embedding_size=context.embedding_size,
        seed=context.seed,
        optim=context.class_centers,
        dtype=context.dtype,
        items=items,
    )
