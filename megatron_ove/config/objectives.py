"""Objectives: one class per kind of loss. The map's names become metric prefixes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from megatron_ove.config.base import StrictModel
from megatron_ove.config.regions import RegionConfig

if TYPE_CHECKING:
    from megatron_ove.config.train import TrainConfig


def _form_of_names(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "name"


SourceNames = Annotated[
    Annotated[str, Tag("name")] | Annotated[Annotated[tuple[str, ...], Field(min_length=1)], Tag("list")],
    Discriminator(_form_of_names),
]
"""A source, or a list of sources."""


class ObjectiveConfig(StrictModel):
    """What every kind of objective has."""

    kind: str
    source: SourceNames
    """Name of the data source whose samples this objective sees, or a list of names."""
    loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of this objective in the total loss."""

    @property
    def reads_pooled(self) -> bool:
        """Whether it needs an embedding of every sample from the encoder."""
        return False

    reads_texts: ClassVar[bool] = False
    """Whether it reads texts of samples, for which `data.text_tokens_per_microbatch` has room."""

    from_shards: ClassVar[tuple[str, ...]] = ()
    """Fields that are taken from the shard sets of its sources where they are null."""

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Fields that are still to be filled in before a run is built."""
        return tuple(field for field in self.from_shards if getattr(self, field) is None)

    @property
    def starts_from(self) -> dict[str, str]:
        """Its parts whose weights a new run takes from folders that the section names -> these."""
        return {}

    @property
    def items_per_sample(self) -> int:
        """Items of a sample that its loss is about, where it shows their embeddings to other ranks."""
        return 1

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    def check_run(self, run: TrainConfig, name: str) -> Iterator[str]:
        """Yields a sentence for everything in which the section, called `name`, does not fit the rest of a run."""
        return iter(())

    def _check_sources_differ(self) -> Iterator[str]:
        twice = [name for name in dict.fromkeys(self.sources) if self.sources.count(name) > 1]
        if twice:
            yield f"source names '{twice[0]}' twice, but its samples are seen once a step; name it once"


def source_names(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the sources of a stored section, plain values."""
    source = section["source"]
    return (source,) if isinstance(source, str) else tuple(source)


class PartialFCConfig(ObjectiveConfig):
    """Cluster discrimination against class centers sharded over ranks: a margin softmax per drawn label."""

    from_shards: ClassVar[tuple[str, ...]] = ("num_classes",)
    kind: Literal["partial_fc"]  # pyright: ignore[reportIncompatibleVariableOverride]
    num_classes: Annotated[int, Field(gt=1, le=2**31)] | None = None
    """Rows of the class-center table; label ids are 0 .. num_classes - 1. null = as many as the source's shard set has;
    the resolved configuration and checkpoints hold the number."""
    level: Literal["sample", "region"] = "sample"
    """What has labels: sample = all that a sample shows, as one embedding; region = boxes in it, see `regions`."""
    regions: RegionConfig = RegionConfig()
    """Of level: region."""
    labels_per_step: Annotated[int, Field(gt=0)] = 8
    """Labels drawn per sample (of a region: per region) and step from its stored ones, without replacement."""
    margin_type: Literal["cosface", "arcface", "combined"] = "cosface"
    """cosface: cos - margin on the target; arcface: cos(angle + margin); combined: cos(m1 angle + m2) - m3."""
    margin: Annotated[float, Field(ge=0, lt=1.5)] = 0.3
    """Margin: a cosine for cosface, radians for arcface."""
    combined_margin: tuple[float, float, float] | None = None
    """(m1, m2, m3) of margin_type: combined, in place of `margin`."""
    logit_scale: Annotated[float, Field(gt=0, le=500)] = 64.0
    """Factor between cosine and logit."""
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Share of the classes drawn as negatives into each class set; the labels of the step come on top."""
    num_sampled: Annotated[int, Field(gt=0)] | None = None
    """The same as a number of classes; takes the place of `sample_rate`."""
    sampling_correction: Literal["none", "logq"] = "none"
    """logq: a drawn negative counts 1 / its probability, so that the loss estimates the full softmax's."""
    negatives: Literal["per_label", "grouped", "shared"] = "per_label"
    """per_label: every label slot draws its own class set; grouped: groups of slots do; shared: one set serves all."""
    negative_groups: Annotated[int, Field(gt=0)] | None = None
    """Class sets of negatives: grouped."""
    co_positives: Literal["negative", "masked"] = "masked"
    """Whether a sample's other labels of the step count as negatives of a label or are left out."""
    interclass_filter: Annotated[float, Field(gt=-1, le=1)] = 0.75
    """Negatives with a cosine above this are taken for unlabelled positives; 1.0 switches the filter off."""
    interclass_filter_mode: Literal["zero", "mask"] = "zero"
    """zero: a filtered negative gets logit 0, as published; mask: it leaves the softmax."""
    centering: Literal["none", "gradient", "embeddings"] = "none"
    """gradient: what all labelled samples of a microbatch have in common is taken out of their embeddings' gradient;
    embeddings: out of the embeddings too. For small runs from fresh weights; depends on what shares a microbatch."""
    class_group: Literal["stage", "tensor"] = "stage"
    """Ranks that share the table: all of the last pipeline stage (tensor x data), or the tensor-parallel ones only."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Operands of the GEMMs; sums are fp32. auto: train.precision, but never bfloat16 on a CPU that must imitate it."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """Who computes softmax and update: plain torch, or fused Triton kernels. auto: Triton on a GPU that has it."""
    chunk_size: Annotated[int, Field(gt=0)] = 1024
    """Active rows that plain torch works on at a time; few enough to stay in cache."""

    @property
    def reads_pooled(self) -> bool:
        return self.level == "sample"

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        regions = self.regions
        names_tokens = self.level == "region" and regions.labels == "tokens" and regions.tokenizer_fingerprint is None
        return (*super().unknown_fields, *(("regions",) if names_tokens else ()))

    @property
    def items_per_sample(self) -> int:
        """Embeddings of a sample that meet the table."""
        return self.regions.per_sample if self.level == "region" else 1

    def _check_level(self) -> Iterator[str]:
        if self.level == "sample" and self.regions != RegionConfig():
            yield "regions has no effect with level: sample, which sees whole samples; set level: region or remove it"

    def _check_margin(self) -> Iterator[str]:
        if self.margin_type == "cosface" and self.margin >= 1:
            yield (
                f"margin = {self.margin} is outside [0, 1) for cosface, where it is subtracted from a cosine; "
                "use about 0.3, or margin_type: arcface for a margin in radians"
            )
        if self.margin_type == "combined" and self.combined_margin is None:
            yield (
                "margin_type: combined has no combined_margin, and its three margins have no usual values; add "
                "combined_margin: [m1, m2, m3], for instance [1.0, 0.3, 0.2]"
            )
        if self.margin_type == "combined" and self.combined_margin is not None:
            factor, angle, cosine = self.combined_margin
            if not (0 < factor <= 2 and 0 <= angle < 1.5 and 0 <= cosine < 1):
                yield (
                    f"combined_margin = {list(self.combined_margin)} is outside its ranges: m1, a factor of the angle, "
                    "in (0, 2], m2, radians, in [0, 1.5), m3, a cosine, in [0, 1); use for instance [1.0, 0.3, 0.2]"
                )
        if self.margin_type != "combined" and self.combined_margin is not None:
            yield (
                f"combined_margin = {list(self.combined_margin)} has no effect with margin_type: {self.margin_type}, "
                "which reads margin; set margin_type: combined or remove combined_margin"
            )

    def _check_negatives(self) -> Iterator[str]:
        groups = self.negative_groups
        if self.negatives == "grouped" and groups is None:
            yield (
                "negatives: grouped does not say how many class sets to draw; add negative_groups, for instance "
                f"{max(1, self.labels_per_step // 2)}"
            )
        if self.negatives != "grouped" and groups is not None:
            yield (
                f"negative_groups = {groups} has no effect with negatives: {self.negatives}; set negatives: grouped "
                "or remove negative_groups"
            )
        if self.negatives == "grouped" and groups is not None and groups > self.labels_per_step:
            yield (
                f"negative_groups = {groups} is more than labels_per_step = {self.labels_per_step}, so some class sets "
                f"would serve no label; set negative_groups to {self.labels_per_step} or less"
            )
        if self.num_classes is None:
            return  # checked when the number is filled in
        if self.num_sampled is not None and self.num_sampled > self.num_classes:
            yield (
                f"num_sampled = {self.num_sampled} is more than num_classes = {self.num_classes}; set it to "
                f"{self.num_classes} or less, or use sample_rate: 1.0 for the full softmax"
            )
        share = 1 - (1 - self.inclusion_probability) ** len(self.slots_of_sets)
        if round(share * self.num_classes) == 0:
            yield (
                f"sample_rate = {self.sample_rate:g} of num_classes = {self.num_classes} draws no negative at all; set "
                f"sample_rate to {1 / self.num_classes:.1g} or more, or num_sampled"
            )

    @property
    def table_size(self) -> int:
        """`num_classes`, once it is known.

        Raises:
            ValueError: it is still to be taken from the shard set, by `data/class_counts.py`.
        """
        if self.num_classes is None:
            raise ValueError(f"num_classes of an objective of source {self.source} was not filled in")
        return self.num_classes

    @property
    def inclusion_probability(self) -> float:
        """Chance of a class to be drawn as a negative into a class set."""
        return self.sample_rate if self.num_sampled is None else self.num_sampled / self.table_size

    @property
    def slots_of_sets(self) -> list[range]:
        """The label slots that each class set serves, in order and of nearly equal number."""
        count = {"per_label": self.labels_per_step, "shared": 1}.get(self.negatives, self.negative_groups or 1)
        edges = [index * self.labels_per_step // count for index in range(count + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(edges)]
