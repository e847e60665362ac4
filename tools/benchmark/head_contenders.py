"""The heads that are compared, behind one interface: the same samples in, one optimizer step done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from full_softmax_head import FullSoftmaxHead
from published_head import PublishedHead
from pydantic import ValidationError
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack
from megatron_ove.batch import Samples as BatchSamples
from megatron_ove.config.base import StrictModel
from megatron_ove.config.error_report import describe_errors
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.errors import ConfigError
from megatron_ove.kinds import load_kinds
from megatron_ove.outputs import VisionFeatures

if TYPE_CHECKING:
    from megatron_ove.parallel.topology import ParallelTopology

Config = TypeVar("Config", bound=StrictModel)
NAME, SOURCE = "head", "pages"
LEARNING_RATE = 1e-4

# Ours -> (options of the head, options of its optimizer) that differ from the package's defaults.
OURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "per_label": ({"negatives": "per_label"}, {}),
    "shared": ({"negatives": "shared"}, {}),
    "grouped": ({"negatives": "grouped", "negative_groups": 4}, {}),
    "compact": ({}, {"weight_dtype": "bfloat16", "first_moment": "none", "second_moment": "row"}),
    # What the published head keeps: the algorithm's gain without that of smaller moments.
    "per_label_adamw": ({"negatives": "per_label"}, {"first_moment": "float32", "second_moment": "element"}),
}
OTHERS = {
    "published": "8 sets, dense gradient, dense AdamW",
    "published_fused": "the same with PyTorch's fused AdamW",
    "full_softmax": "every class, chunked, dense AdamW",
}
# The defaults of the package, sample rate included; all others of ours are compared at the rate of the published one.
OWN_RATE = ("default", "compact")


@dataclass(frozen=True)
class Workload:
    """What every contender is given.

    Attributes:
        batch_size: samples of a microbatch, over all ranks.
        stored_labels: labels that a sample has; `labels_per_step` of them are drawn in every step.
        sample_rate: of the published head and of ours, except in the contenders of `OWN_RATE`.
        active_rows: when given, sets are drawn so small that about so many classes are in their union.
        label_distribution: "uniform", or "zipf" = class id log-uniform, as ids sorted by frequency are.
        head_options: of ours, over everything else.
        optim_options: of ours, over everything else.
    """

    num_classes: int
    embedding_size: int = 1024
    batch_size: int = 64
    stored_labels: int = 100
    labels_per_step: int = 8
    microbatches: int = 1
    sample_rate: float = 0.1
    active_rows: int | None = None
    label_distribution: str = "uniform"
    head_options: Mapping[str, Any] = field(default_factory=dict)
    optim_options: Mapping[str, Any] = field(default_factory=dict)

    def rate_of_sets(self, num_sets: int) -> float:
        """Returns the share of classes in each of a number of independent sets."""
        if self.active_rows is None:
            return self.sample_rate
        return 1 - (1 - min(1.0, self.active_rows / self.num_classes)) ** (1 / num_sets)

    def samples(self, step: int, rank: int, ranks: int) -> list[Samples]:
        """Returns a rank's microbatches of a step; the same numbers for every contender."""
        generator = torch.Generator().manual_seed(step * ranks + rank)
        count = self.batch_size // ranks
        return [self._draw(count, generator) for _ in range(self.microbatches)]

    def _draw(self, count: int, generator: torch.Generator) -> Samples:
        shape = count, self.stored_labels
        if self.label_distribution == "zipf":
            labels = torch.rand(shape, generator=generator, dtype=torch.float64).mul_(-1).add_(1)
            labels = (self.num_classes**labels).long().clamp_(max=self.num_classes) - 1
        else:
            labels = torch.randint(self.num_classes, shape, generator=generator)
        seeds = torch.randint(2**62, (count,), generator=generator)
        return Samples(torch.randn(count, self.embedding_size, generator=generator), labels, seeds)


@dataclass(frozen=True)
class Samples:
    """A rank's part of a microbatch: pooled [b, e] fp32, labels [b, L] int64, seeds [b] int64; on the CPU."""

    pooled: Tensor
    labels: Tensor
    seeds: Tensor


class Contender(Protocol):
    """A head with its optimizer."""

    def prepare(self, microbatches: Sequence[Samples]) -> Any:
        """Returns what `step` takes; not timed."""
        ...

    def step(self, index: int, prepared: Any) -> Tensor:
        """Does one optimizer step, through to the gradients of the pooled embeddings; returns a loss."""
        ...


def head_config(name: str, work: Workload) -> PartialFCConfig:
    """Returns the configuration of one of ours.

    Raises:
        ConfigError: an option does not exist or has a wrong value.
    """
    options = {"labels_per_step": work.labels_per_step, **OURS[name][0]}
    if name not in OWN_RATE:
        options["sample_rate"] = work.sample_rate
    options.update(work.head_options)
    fixed = {"kind": "partial_fc", "source": SOURCE, "num_classes": work.num_classes}
    config = _parse(PartialFCConfig, options | fixed, "--head")
    if work.active_rows is not None:
        rate = work.rate_of_sets(len(config.slots_of_sets))
        config = config.model_copy(update={"num_sampled": max(1, round(rate * work.num_classes))})
    return config


def optim_config(name: str, work: Workload) -> ClassCenterOptimConfig:
    """Returns the optimizer of one of ours; see `head_config`."""
    return _parse(ClassCenterOptimConfig, OURS[name][1] | dict(work.optim_options), "--optim")


class OurHead:
    """The package's own head, used as the training step uses it."""

    def __init__(self, name: str, work: Workload, topology: ParallelTopology) -> None:
        from megatron_ove.objectives.build import build_objectives  # megatron-core: only workers need it

        self._topology = topology
        self._scale = work.microbatches * topology.data_size / (work.batch_size * work.microbatches)
        self._objectives = build_objectives(
            {NAME: head_config(name, work)},
            kinds=load_kinds(),
            topology=topology,
            embedding_size=work.embedding_size,
            seed=0,
            optim=optim_config(name, work),
        )

    def prepare(self, microbatches: Sequence[Samples]) -> list[tuple[Batch, Tensor]]:
        """Returns the batches and their embeddings."""
        device = self._topology.device
        return [
            (_make_batch(samples).to(device), samples.pooled.to(device).requires_grad_()) for samples in microbatches
        ]

    def step(self, index: int, prepared: list[tuple[Batch, Tensor]]) -> Tensor:
        """Does a step, refusal of non-finite gradients included."""
        batches = [batch for batch, _ in prepared]
        num_samples = [batch.num_samples for batch in batches]  # of every rank
        counts = {SOURCE: np.array([num_samples] * self._topology.data_size)}
        self._objectives.begin_step(self._objectives.prepare_step(index, batches, counts))
        loss = torch.zeros((), device=self._topology.device)
        for batch, pooled in prepared:
            pack = batch.main
            features = VisionFeatures(pooled[:0], pack.cu_seqlens, pack.grids, pack.sample, pooled)
            output = self._objectives.forward(features, batch, {NAME: self._scale})
            mean = output.loss / len(prepared)
            mean.backward()
            loss += mean.detach()
        self._objectives.gradient_norms()
        self._objectives.step(LEARNING_RATE)
        return loss


class DenseContender:
    """A head that is a plain PyTorch module with a table of its own."""

    def __init__(self, head: PublishedHead | FullSoftmaxHead, device: torch.device, num_slots: int) -> None:
        self._head, self._device, self._num_slots = head, device, num_slots

    def prepare(self, microbatches: Sequence[Samples]) -> list[tuple[Tensor, Tensor]]:
        """Returns embeddings and labels on the device."""
        device = self._device
        return [(part.pooled.to(device).requires_grad_(), part.labels.to(device)) for part in microbatches]

    def step(self, index: int, prepared: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Does a step; the labels of a step are the first of a random order of a sample's."""
        loss = torch.zeros((), device=self._device)
        for pooled, labels in prepared:
            order = torch.rand(labels.shape, device=self._device).argsort(1)[:, : self._num_slots]
            mean = self._head.loss(pooled, labels.gather(1, order)) / len(prepared)
            mean.backward()
            loss += mean.detach()
        self._head.update()
        return loss


def build_contender(name: str, work: Workload, topology: ParallelTopology) -> Contender:
    """Builds a contender on this rank."""
    if name in OURS:
        return OurHead(name, work, topology)
    torch.manual_seed(topology.global_rank)
    if name == "full_softmax":
        head: Any = FullSoftmaxHead(work.num_classes, work.embedding_size, lr=LEARNING_RATE, device=topology.device)
    else:
        head = PublishedHead(
            work.num_classes,
            work.embedding_size,
            num_slots=work.labels_per_step,
            sample_rate=work.rate_of_sets(work.labels_per_step),
            lr=LEARNING_RATE,
            group=topology.class_group,
            device=topology.device,
            fused_adamw=name == "published_fused",
        )
    return DenseContender(head, topology.device, work.labels_per_step)


def _parse(model: type[Config], options: dict[str, Any], flag: str) -> Config:
    try:
        return model.model_validate_json(json.dumps(options))  # as JSON, so that a list may stand for a tuple
    except ValidationError as error:
        raise ConfigError(f"{flag}: {describe_errors(error, options, model)[0]}") from error


def _make_batch(samples: Samples) -> Batch:
    count = len(samples.seeds)
    pack = PatchPack.of_whole_samples(
        torch.zeros(count, 3, dtype=torch.int32), torch.arange(count + 1, dtype=torch.int32)
    )
    keys = tuple(f"sample-{index}" for index in range(count))
    known = BatchSamples.of_one_source(SOURCE, keys, samples.seeds)
    return Batch({MAIN_PACK: pack}, known, {NAME: samples.labels.int()})
