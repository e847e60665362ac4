"""`PartialFC`: cluster discrimination. Each drawn label of a sample is one margin softmax over the active classes.

A step's labels are exchanged once, in `begin_step`, with all sizes and active classes that its microbatches need; a
microbatch then costs a gather of embeddings, one exchange of softmax statistics, and a reduce-scatter of gradients.
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
from megatron_ove.heads.active_classes import ActiveRows, draw_class_set, select_active_rows
from megatron_ove.heads.class_centers import ClassCenters
from megatron_ove.heads.margin_softmax import MarginSoftmax
from megatron_ove.heads.sampled_softmax import sampled_log_sum_exp
from megatron_ove.objectives.base import Objective
from megatron_ove.objectives.label_exchange import exchange_labels, find_bad_label
from megatron_ove.objectives.label_slots import draw_label_slots
from megatron_ove.outputs import LossTerms, VisionFeatures
from megatron_ove.parallel.collectives import all_gather_rows, sum_gradient_over_group
from megatron_ove.parallel.random import stateless_seed
from megatron_ove.parallel.topology import ParallelTopology


@dataclass(frozen=True)
class _MicrobatchPlan:
    """What `forward` needs to know about one microbatch; b counts the gathered samples, of all replicas.

    Attributes:
        batch: the microbatch itself; keeps its id taken.
        rows: [b_own] int64, this replica's samples of the source within the microbatch.
        labels: [b, k] int64, drawn labels, -1 = none.
        targets: [b, k] int64, place of each label among this rank's active rows, -1 = elsewhere.
        co_members: [b, k, k] bool, whether label l is in the class set of slot j; None = always.
        row_counts: samples of each replica, in rank order.
        own: this replica's samples within the b.
    """

    batch: Batch
    rows: Tensor
    labels: Tensor
    targets: Tensor
    co_members: Tensor | None
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
    ) -> None:
        self.name = name
        self.source = config.source
        self._config = config
        self._topology = topology
        self._seed = seed
        # A table over the whole stage sees the samples of all replicas. A table over tensor ranks exists once per
        # replica and sees that replica's samples only; its gradients are summed over the replicas instead.
        self._is_stage_wide = config.class_group == "stage"
        self._class_group = topology.class_group if self._is_stage_wide else topology.tensor_group
        self._softmax = MarginSoftmax(
            margin_type=config.margin_type,
            margin=config.margin,
            logit_scale=config.logit_scale,
            interclass_filter=config.interclass_filter,
            interclass_filter_mode=config.interclass_filter_mode,
            co_positives=config.co_positives,
        )
        self.centers = ClassCenters(
            name,
            num_classes=config.num_classes,
            embedding_size=embedding_size,
            seed=seed,
            optim=optim,
            class_group=self._class_group,
            replica_group=None if self._is_stage_wide else topology.data_group,
            gradient_scale=1 / topology.data_size,
            device=topology.device,
        )
        self._plans: dict[int, _MicrobatchPlan] = {}
        self._active: ActiveRows | None = None

    def num_items(self, batch: Batch) -> int:
        labels = batch.labels.get(self.source)
        return 0 if labels is None else int((labels >= 0).any(1).sum())

    def begin_step(self, step: int, batches: Sequence[Batch]) -> None:
        mistake = find_bad_label(self.name, self.source, self._config.num_classes, batches)
        rows = [batch.rows_of(self.source) for batch in batches]
        drawn = [self._draw_slots(batch, chosen) for batch, chosen in zip(batches, rows, strict=True)]
        labels = exchange_labels(
            drawn, mistake, self._topology.data_group, on_every_rank=self._topology.pipeline_size == 1
        )
        class_sets = self._draw_class_sets(step, torch.cat([part for replica in labels for part in replica]))
        self._active = select_active_rows(
            class_sets,
            first_class=self.centers.first_class,
            num_rows=self.centers.num_rows,
            chunk_size=self._config.chunk_size,
        )
        self.centers.begin_step(self._active.rows)
        self._plans = {
            id(batch): self._plan(batch, rows[index], class_sets, [replica[index] for replica in labels])
            for index, batch in enumerate(batches)
        }

    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        plan = self._plans.get(id(batch))
        if plan is None or self._active is None:
            raise RuntimeError(f"objective '{self.name}' got a batch that was not given to begin_step")
        embeddings = normalize(features.pooled[plan.rows].float(), dim=1)  # [b_own, e]
        embeddings = sum_gradient_over_group(embeddings, self._topology.tensor_group)
        if self._is_stage_wide:
            embeddings = all_gather_rows(embeddings, self._topology.data_group, plan.row_counts)  # [b, e]
        negatives, target_cosine = sampled_log_sum_exp(
            embeddings,
            self.centers.directions,
            self.centers.row_gradient,
            plan.targets,
            active=self._active,
            softmax=self._softmax,
            class_group=self._class_group,
        )
        losses = self._softmax.sample_losses(negatives, target_cosine, plan.labels, plan.co_members)  # [b]
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
        self._end_step()

    def discard_update(self) -> None:
        self.centers.discard_update()
        self._end_step()

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        return self.centers.sharded_state_dict(prefix)

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.centers.load_state(state)

    def _end_step(self) -> None:
        self._plans, self._active = {}, None

    def _draw_slots(self, batch: Batch, rows: Tensor) -> Tensor:
        labels = batch.labels.get(self.source)
        if labels is None:
            labels = torch.empty(0, 1, dtype=torch.int64, device=batch.source_index.device)
        if labels.shape[0] != rows.shape[0]:
            raise ValueError(
                f"a batch has {rows.shape[0]} samples of source '{self.source}' but {labels.shape[0]} rows of labels"
            )
        return draw_label_slots(labels, batch.sample_seeds[rows], self._config.labels_per_step)

    def _draw_class_sets(self, step: int, labels: Tensor) -> list[Tensor]:
        """Returns the classes of each softmax of the step, global ids; a set without positives has nothing to do.

        Args:
            step: steps done before.
            labels: [b, k], of the whole step and all replicas.
        """
        config = self._config
        num_active = max(1, round(config.sample_rate * config.num_classes))
        # Sets that hold every class are equal, so one does.
        has_set_per_slot = config.negatives == "per_label" and num_active < config.num_classes
        groups = labels.unbind(1) if has_set_per_slot else [labels]
        sets = []
        for index, group in enumerate(groups):
            positives = group[group >= 0].unique()
            if positives.numel():
                key = stateless_seed(self._seed, self.name, "negatives", step, index)
                positives = draw_class_set(positives, num_classes=config.num_classes, num_active=num_active, key=key)
            sets.append(positives)
        return sets

    def _plan(
        self, batch: Batch, rows: Tensor, class_sets: Sequence[Tensor], by_replica: Sequence[Tensor]
    ) -> _MicrobatchPlan:
        assert self._active is not None
        rank = self._topology.data_rank
        if self._is_stage_wide:
            labels = torch.cat(list(by_replica))
            first = sum(len(part) for part in by_replica[:rank])
        else:
            labels, first = by_replica[rank], 0
        # With one set for all slots every label is in it.
        co_members = None
        if self._config.co_positives == "negative" and len(class_sets) > 1:
            co_members = torch.stack([torch.isin(labels, classes) for classes in class_sets], dim=1)
        return _MicrobatchPlan(
            batch=batch,
            rows=rows,
            labels=labels,
            targets=self._active.positions_of(labels, self.centers.first_class),
            co_members=co_members,
            row_counts=tuple(len(part) for part in by_replica),
            own=slice(first, first + len(rows)),
        )


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
