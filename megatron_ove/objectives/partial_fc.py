"""`PartialFC`: cluster discrimination. Each drawn label of a sample is one margin softmax over sampled classes.

A step's labels are exchanged once, in `begin_step`, with all sizes and active rows that its microbatches need. A
microbatch then costs three collectives for all heads together: a gather of embeddings, one sum of softmax statistics,
and a reduce-scatter of gradients. After `begin_step` nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_ove.batch import Batch
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.errors import ConfigError
from megatron_ove.heads import triton_backend
from megatron_ove.heads.active_classes import NegativeDraw, draw_negatives, find, select_active_rows
from megatron_ove.heads.class_centers import ClassCenters
from megatron_ove.heads.fused_softmax import MOST_LABELS, MOST_SETS, FusedSoftmax
from megatron_ove.heads.margin_softmax import LARGEST_FP32_SCALE, MarginSoftmax
from megatron_ove.heads.sampled_softmax import HeadShare, SampledSoftmax, exchange_statistics
from megatron_ove.objectives.base import Objective
from megatron_ove.objectives.label_exchange import exchange_labels, find_bad_label
from megatron_ove.objectives.label_slots import draw_label_slots
from megatron_ove.outputs import LossTerms, VisionFeatures
from megatron_ove.parallel.class_order import rows_of_classes
from megatron_ove.parallel.collectives import gather_replica_rows, sum_gradient_over_group
from megatron_ove.parallel.random import stateless_seed
from megatron_ove.parallel.topology import ParallelTopology


@dataclass(frozen=True)
class _MicrobatchPlan:
    """What `forward` needs to know about one microbatch; b counts the samples that meet the table.

    Attributes:
        batch: the microbatch itself; keeps its id taken.
        rows: [b_own] int64, this replica's samples of the source within the microbatch.
        labels: [b, k] int64, table rows of the drawn labels, -1 = none.
        targets: [k, b] int64, place of each label among this rank's active rows, -1 = elsewhere.
        set_of_slot: [k] int64, class set that serves each slot.
        co_weights: [b, k, k] fp32, what label l counts in the class set of slot j; None = always 1.
        row_counts: samples of each replica, in rank order.
        own: this replica's samples within the b.
    """

    batch: Batch
    rows: Tensor
    labels: Tensor
    targets: Tensor
    set_of_slot: Tensor
    co_weights: Tensor | None
    row_counts: tuple[int, ...]
    own: slice


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
    ) -> None:
        self.name = name
        self.source = config.source
        self._config = config
        self._topology = topology
        self._seed = seed
        # A table over the whole stage sees the samples of all replicas. A table over tensor ranks exists once per
        # replica and sees that replica's samples only; its gradients are summed over the replicas instead.
        self._is_stage_wide = config.class_group == "stage"
        self._is_fused = _uses_triton(name, config, optim, topology.device)
        self._softmax = MarginSoftmax(
            margin_type=config.margin_type,
            margin=config.margin,
            logit_scale=config.logit_scale,
            interclass_filter=config.interclass_filter,
            interclass_filter_mode=config.interclass_filter_mode,
            co_positives=config.co_positives,
            combined_margin=config.combined_margin or (1.0, 0.0, 0.0),
        )
        self.centers = ClassCenters(
            name,
            num_classes=config.num_classes,
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
        self._plans: dict[int, _MicrobatchPlan] = {}

    def num_items(self, batch: Batch) -> int:
        labels = batch.labels.get(self.source)
        return 0 if labels is None else int((labels >= 0).any(1).sum())

    def begin_step(self, step: int, batches: Sequence[Batch]) -> None:
        mistake = find_bad_label(self.name, self.source, self._config.num_classes, batches)
        rows = [batch.rows_of(self.source) for batch in batches]
        drawn = [self._draw_slots(batch, chosen) for batch, chosen in zip(batches, rows, strict=True)]
        labels = exchange_labels(
            drawn, mistake, self._topology.data_host_group, on_every_rank=self._topology.pipeline_size == 1
        )
        everything = torch.cat([part for replica in labels for part in replica])  # [n, k]
        draw, set_of_slot = self._draw_class_sets(step, everything)
        device = self._topology.device
        active = select_active_rows(
            draw,
            everything.to(device, non_blocking=True),
            set_of_slot,
            first_row=self.centers.first_row,
            num_rows=self.centers.num_rows,
            corrects_sampling=self._config.sampling_correction == "logq",
        )
        seen = labels if self._is_stage_wide else [labels[self._topology.data_rank]]
        samples = [sum(len(part) for part in parts) for parts in zip(*seen, strict=True)]
        self.centers.begin_step(active, samples, draw.share_with(everything))
        self._plans = {
            id(batch): self._plan(batch, rows[index], draw, set_of_slot, everything, [one[index] for one in labels])
            for index, batch in enumerate(batches)
        }

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

    def plan_of(self, batch: Batch) -> _MicrobatchPlan:
        """Returns what `begin_step` prepared for a microbatch."""
        plan = self._plans.get(id(batch))
        if plan is None:
            raise RuntimeError(f"objective '{self.name}' got a batch that was not given to begin_step")
        return plan

    def softmax_of(self, embeddings: Tensor, plan: _MicrobatchPlan) -> HeadShare:
        """Returns this rank's share of the softmax of a microbatch whose [b, e] embeddings are gathered."""
        share = FusedSoftmax if self._is_fused else SampledSoftmax
        return share(self.centers.step_table, self._softmax, embeddings, plan.targets)

    def loss_terms(self, negatives: Tensor, target_cosine: Tensor, plan: _MicrobatchPlan) -> LossTerms:
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

    def row_gradient_norm(self) -> Tensor:
        return self.centers.row_gradient_norm()

    def apply_update(self, lr: float) -> None:
        self.centers.apply_update(lr)
        self._plans = {}

    def discard_update(self) -> None:
        self.centers.discard_update()
        self._plans = {}

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        return self.centers.sharded_state_dict(prefix)

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.centers.load_state(state)

    def _draw_slots(self, batch: Batch, rows: Tensor) -> Tensor:
        """Returns table rows of the drawn labels, [b_own, k] int64, -1 = none."""
        labels = batch.labels.get(self.source)
        if labels is None:
            labels = torch.empty(0, 1, dtype=torch.int64)
        if labels.shape[0] != rows.shape[0]:
            raise ValueError(
                f"a batch has {rows.shape[0]} samples of source '{self.source}' but {labels.shape[0]} rows of labels"
            )
        drawn = draw_label_slots(labels, batch.sample_seeds[rows], self._config.labels_per_step)
        return rows_of_classes(drawn, self._config.num_classes)

    def _draw_class_sets(self, step: int, labels: Tensor) -> tuple[NegativeDraw, Tensor]:
        """Returns (the step's negatives, the class set of each slot [k]); slots without any label have no set.

        Args:
            step: steps done before.
            labels: [n, k] on the CPU, of the whole step and all replicas.
        """
        config, device = self._config, self._topology.device
        is_used = (labels >= 0).any(0).tolist()
        served = [slots for slots in config.slots_of_sets if any(is_used[slot] for slot in slots)]
        set_of_slot = torch.zeros(config.labels_per_step, dtype=torch.int64)
        key = stateless_seed(self._seed, self.name, "negatives", step)
        num_classes, probability = config.num_classes, config.inclusion_probability
        if not served:
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            return NegativeDraw(num_classes, nothing, 1.0, 1, key), set_of_slot.to(device, non_blocking=True)
        draw = draw_negatives(num_classes, probability=probability, num_sets=len(served), key=key, device=device)
        if draw.num_sets > 1:
            for index, slots in enumerate(served):
                set_of_slot[slots.start : slots.stop] = index
        return draw, set_of_slot.to(device, non_blocking=True)

    def _plan(
        self,
        batch: Batch,
        rows: Tensor,
        draw: NegativeDraw,
        set_of_slot: Tensor,
        step_labels: Tensor,
        by_replica: Sequence[Tensor],
    ) -> _MicrobatchPlan:
        device, rank = self._topology.device, self._topology.data_rank
        if self._is_stage_wide:
            labels = torch.cat(list(by_replica))
            first = sum(len(part) for part in by_replica[:rank])
        else:
            labels, first = by_replica[rank], 0
        labels = labels.to(device, non_blocking=True)
        # With one set for all slots every label is in it.
        co_weights = None
        if self._config.co_positives == "negative" and draw.num_sets > 1:
            drawn_weight = 1 / draw.probability if self._config.sampling_correction == "logq" else 1.0
            step_labels = step_labels.to(device, non_blocking=True)
            co_weights = _co_weights(draw, labels, set_of_slot, step_labels, drawn_weight)
        local = torch.where(labels >= 0, labels - self.centers.first_row, -1)
        return _MicrobatchPlan(
            batch=batch,
            rows=rows.to(device, non_blocking=True),
            labels=labels,
            targets=self.centers.step_table.active.positions_of(local).T.contiguous(),
            set_of_slot=set_of_slot,
            co_weights=co_weights,
            row_counts=tuple(len(part) for part in by_replica),
            own=slice(first, first + len(rows)),
        )


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


def _co_weights(
    draw: NegativeDraw, labels: Tensor, set_of_slot: Tensor, step_labels: Tensor, drawn_weight: float
) -> Tensor:
    """Returns [b, k, k] fp32: what label l of a sample counts in the class set of its slot j, as any other row does."""
    drawn = draw.contains(labels)[..., None] & draw.membership(labels)  # [b, k, s]
    of_set = (step_labels.masked_fill((set_of_slot != index)[None], -1) for index in range(draw.num_sets))
    is_positive = torch.stack([find(positives.flatten().sort().values, labels) >= 0 for positives in of_set], dim=-1)
    weights = (drawn * drawn_weight).masked_fill(is_positive, 1.0)
    return weights[..., set_of_slot].transpose(1, 2)


def _forward_heads(heads: Sequence[PartialFC], features: VisionFeatures, batch: Batch) -> list[LossTerms]:
    """Three collectives for heads whose tables are sharded over the same ranks: gather, sum, reduce-scatter."""
    plans = [head.plan_of(batch) for head in heads]
    topology, centers = heads[0]._topology, heads[0].centers
    embeddings = normalize(features.pooled[torch.cat([plan.rows for plan in plans])].float(), dim=1)
    if heads[0]._is_stage_wide:
        totals = [sum(counts) for counts in zip(*(plan.row_counts for plan in plans), strict=True)]
        embeddings = gather_replica_rows(embeddings, topology.data_group, topology.class_group, totals)
        gathered = _split_by_head(embeddings, [plan.row_counts for plan in plans])
    else:
        embeddings = sum_gradient_over_group(embeddings, topology.tensor_group)
        gathered = list(embeddings.split([len(plan.rows) for plan in plans]))
    parts = [head.softmax_of(x, plan) for head, x, plan in zip(heads, gathered, plans, strict=True)]
    statistics = exchange_statistics(parts, centers.class_group)
    return [head.loss_terms(*pair, plan) for head, pair, plan in zip(heads, statistics, plans, strict=True)]


def _split_by_head(rows: Tensor, counts: Sequence[Sequence[int]]) -> list[Tensor]:
    """From [replica][head] order to one tensor per head.

    Args:
        rows: [sum of all counts, e].
        counts: [head][replica].
    """
    if len(counts) == 1:
        return [rows]
    blocks = rows.split([count for replica in zip(*counts, strict=True) for count in replica])
    return [torch.cat(blocks[head :: len(counts)]) for head in range(len(counts))]


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
