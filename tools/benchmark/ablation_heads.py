"""The heads that the ablation compares, behind one interface, and the table of variants.

`published` is the plain torch head of the published method; every other variant is the package's own head, as the
training step uses it, and says only in what it differs from the package's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from published_head import PublishedHead
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack, Samples
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.kinds import load_kinds
from megatron_ove.objectives.build import build_objectives
from megatron_ove.objectives.label_slots import draw_label_slots
from megatron_ove.objectives.partial_fc import PartialFC
from megatron_ove.outputs import VisionFeatures
from megatron_ove.parallel.class_order import rows_of_classes
from megatron_ove.parallel.topology import ParallelTopology

PUBLISHED, DEFAULT, SMALL_EMBEDDINGS = "published", "default", "small_embeddings"
LABELS_PER_STEP, PUBLISHED_RATE = 8, 0.1
_NAME, _SOURCE = "classes", "samples"


@dataclass(frozen=True)
class Variant:
    """One row of the ablation.

    Attributes:
        title: of the row.
        head: options of `PartialFCConfig` that differ from the defaults.
        optim: options of `ClassCenterOptimConfig` that differ from the defaults.
    """

    title: str
    head: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)


_ADAMW = {"first_moment": "float32", "second_moment": "element", "lr_scaling": "none"}
# What examples/read_words/config.yaml says about its head, but for the centering.
_SMALL = {"margin": 0.0, "logit_scale": 16.0, "sample_rate": 1.0, "negatives": "shared", "interclass_filter": 1.0}
_SMALL_OPTIM = {"first_moment": "float32", "second_moment": "element", "beta2": 0.98, "lr_multiplier": 0.2}

VARIANTS: dict[str, Variant] = {
    PUBLISHED: Variant("published method (b)"),
    DEFAULT: Variant("default"),
    "rate_10": Variant("sets of 10 %", {"sample_rate": 0.10}),
    "rate_5": Variant("sets of 5 %", {"sample_rate": 0.05}),
    "rate_3": Variant("sets of 3 %", {"sample_rate": 0.03}),
    "rate_1": Variant("sets of 1 %", {"sample_rate": 0.01}),
    "recipe": Variant(
        "published recipe, rows touched only",
        {"sample_rate": 0.1, "co_positives": "negative"},
        _ADAMW,
    ),
    "negative": Variant("co-positives as negatives", {"co_positives": "negative"}),
    "grouped": Variant(
        "4 sets of 10 % for 8 labels", {"negatives": "grouped", "negative_groups": 4, "sample_rate": 0.1}
    ),
    "shared": Variant("one set of 10 % for all labels", {"negatives": "shared", "sample_rate": 0.1}),
    "shared_50": Variant("one set of 50 % for all labels", {"negatives": "shared", "sample_rate": 0.5}),
    "logq": Variant("logQ correction", {"sampling_correction": "logq"}),
    "momentum": Variant("first moment, bf16", optim={"first_moment": "bfloat16"}),
    "element": Variant(
        "AdamW by element: two fp32 moments", optim={"first_moment": "float32", "second_moment": "element"}
    ),
    "lr_x1": Variant("the encoder's learning rate", optim={"lr_scaling": "none"}),
    "lr_x2": Variant("twice the encoder's learning rate", optim={"lr_scaling": "none", "lr_multiplier": 2.0}),
    "lr_x4": Variant("4 x the encoder's learning rate", optim={"lr_scaling": "none", "lr_multiplier": 4.0}),
    "dense": Variant("dense update: idle rows decay and drift", optim={"update": "dense", "lr_scaling": "none"}),
    "bf16": Variant("bf16 weights, stochastic rounding", optim={"weight_dtype": "bfloat16"}),
    "centered_gradient": Variant("common gradient taken away", {"centering": "gradient"}),
    "centered_embeddings": Variant("mean embedding taken away", {"centering": "embeddings"}),
    "centers_slow": Variant("a tenth of the encoder's learning rate", optim={"lr_multiplier": 0.1}),
    "small": Variant("settings of examples/read_words, not centered", _SMALL, _SMALL_OPTIM),
    "small_gradient": Variant("small, common gradient taken away", {**_SMALL, "centering": "gradient"}, _SMALL_OPTIM),
    SMALL_EMBEDDINGS: Variant("small, mean embedding taken away", {**_SMALL, "centering": "embeddings"}, _SMALL_OPTIM),
    "small_margin": Variant("small, margin 0.1", {**_SMALL, "margin": 0.1}, _SMALL_OPTIM),
    "small_scale": Variant("small, scale 32", {**_SMALL, "logit_scale": 32.0}, _SMALL_OPTIM),
    "small_moments": Variant("small, moments as by default", _SMALL, {"beta2": 0.98, "lr_multiplier": 0.2}),
    "small_lr_x1": Variant("small, the encoder's learning rate", _SMALL, {**_SMALL_OPTIM, "lr_multiplier": 1.0}),
}


def configs_of(variant: Variant, num_classes: int) -> tuple[PartialFCConfig, ClassCenterOptimConfig]:
    """Returns the full configuration of a variant of the package's head."""
    fixed = {"kind": "partial_fc", "source": _SOURCE, "num_classes": num_classes, "labels_per_step": LABELS_PER_STEP}
    head = PartialFCConfig.model_validate(fixed | dict(variant.head))
    return head, ClassCenterOptimConfig.model_validate(dict(variant.optim))


def settings_of(name: str, num_classes: int) -> dict[str, Any]:
    """Returns everything that decides a variant's result, as plain data: what a stored run is recognised by."""
    if name == PUBLISHED:
        return {"sample_rate": PUBLISHED_RATE}
    head, optim = configs_of(VARIANTS[name], num_classes)
    return {"head": head.model_dump(mode="json"), "optim": optim.model_dump(mode="json")}


class Head(Protocol):
    """A head with its optimizer. A step is `loss`, a backward pass through it, `update`."""

    def loss(self, step: int, pooled: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        """Returns a scalar.

        Args:
            step: from 0.
            pooled: [b, e] embeddings, not normalized.
            labels: [b, l] class ids, 10 or 1.
            seeds: [b] int64; decide which labels the step uses, for every head the same ones.
        """
        ...

    def update(self, lr: float) -> None:
        """Updates the centers at the encoder's learning rate `lr`."""
        ...

    def centers(self) -> Tensor:
        """Returns [num_classes, e] fp32, in class order."""
        ...

    def embedding_mean(self) -> Tensor | float:
        """Returns what is taken away from an embedding before it is compared with anything: [e] fp32, or 0."""
        ...


class PackageHead:
    """The package's own head."""

    def __init__(
        self, variant: Variant, num_classes: int, embedding_size: int, *, seed: int, topology: ParallelTopology
    ) -> None:
        config, optim = configs_of(variant, num_classes)
        self._objectives = build_objectives(
            {_NAME: config},
            kinds=load_kinds(),
            topology=topology,
            embedding_size=embedding_size,
            seed=seed,
            optim=optim,
        )

    def loss(self, step: int, pooled: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        count = len(pooled)
        pack = PatchPack.of_whole_samples(
            torch.zeros(count, 3, dtype=torch.int32), torch.arange(count + 1, dtype=torch.int32)
        )
        samples = Samples.of_one_source(_SOURCE, tuple(map(str, range(count))), seeds)
        batch = Batch({MAIN_PACK: pack}, samples, {_NAME: labels.int()})
        counts = {_SOURCE: np.array([[count]])}
        self._objectives.begin_step(self._objectives.prepare_step(step, [batch], counts))
        features = VisionFeatures(pooled[:0], pack.cu_seqlens, pack.grids, pack.sample, pooled)
        return self._objectives.forward(features, batch, {_NAME: 1 / count}).loss

    def update(self, lr: float) -> None:
        self._objectives.gradient_norms()
        self._objectives.step(lr)

    def centers(self) -> Tensor:
        objective = self._objectives[_NAME]
        assert isinstance(objective, PartialFC)
        weight = objective.centers.weight
        return weight[rows_of_classes(torch.arange(len(weight)), len(weight))].float()

    def embedding_mean(self) -> Tensor | float:
        mean = self._objectives[_NAME].sharded_state_dict("").get("embedding_mean")  # as a checkpoint would keep it
        return 0.0 if mean is None else mean.data


class PublishedMethod(PublishedHead):
    """The published head at a learning rate that follows a schedule, drawing the same labels as the others.

    It knows no empty slot, so samples with one label have one slot, and a step one set of classes.
    """

    def __init__(self, num_classes: int, embedding_size: int, num_labels: int) -> None:
        self._slots = min(LABELS_PER_STEP, num_labels)
        super().__init__(num_classes, embedding_size, num_slots=self._slots, sample_rate=PUBLISHED_RATE, lr=0.0)

    def loss(self, step: int, pooled: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:  # type: ignore[override]
        return super().loss(pooled, draw_label_slots(labels, seeds, self._slots))

    def update(self, lr: float) -> None:  # type: ignore[override]
        self._optimizer.param_groups[0]["lr"] = lr
        super().update()

    def centers(self) -> Tensor:
        return self.weight.detach()

    def embedding_mean(self) -> Tensor | float:
        return 0.0


def make_head(
    name: str, num_classes: int, embedding_size: int, *, num_labels: int, seed: int, topology: ParallelTopology
) -> Head:
    """Builds a variant with a fresh table, for samples of `num_labels` labels."""
    if name == PUBLISHED:
        return PublishedMethod(num_classes, embedding_size, num_labels)
    return PackageHead(VARIANTS[name], num_classes, embedding_size, seed=seed, topology=topology)
