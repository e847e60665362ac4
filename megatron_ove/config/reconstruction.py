"""Reconstruction: what the encoder's tokens still hold of a teacher's features, or of the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_ove.config.base import StrictModel
from megatron_ove.config.objectives import ObjectiveConfig


class TeacherConfig(StrictModel):
    """A frozen encoder."""

    path: str
    """Checkpoint, HuggingFace folder, or run folder (its newest checkpoint is taken, so of a run that is over) of a
    OneVision-Encoder with the run's patch size. Read again when a run resumes, so it must stay as it is."""
    fingerprint: str | None = None
    """Of its weights; filled in, and compared when a run resumes."""
    max_patches: Annotated[int, Field(gt=0)] | None = None
    """Most patches of a picture that the teacher sees: a larger one is scaled down for it, and its features are
    resampled to the student's patches. null = it sees what the student sees."""


class FeatureReconstructionConfig(ObjectiveConfig):
    """Cosine distance + smooth L1 between a frozen teacher's features and a head on the encoder's tokens."""

    kind: Literal["feature_reconstruction"]  # pyright: ignore[reportIncompatibleVariableOverride]
    teacher: TeacherConfig
    smooth_l1_weight: Annotated[float, Field(ge=0)] = 0.11
    """mu: weight of the smooth L1 distance beside the cosine distance."""

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        return () if self.teacher.fingerprint else ("teacher",)


class PixelReconstructionConfig(ObjectiveConfig):
    """Mean squared error of the pixels that a head on the encoder's tokens rebuilds, and optionally of their edges."""

    kind: Literal["pixel_reconstruction"]  # pyright: ignore[reportIncompatibleVariableOverride]
    structure_weight: Annotated[float, Field(ge=0)] = 0.0
    """alpha: weight of the distance between maps of the distance to the next edge; 0 = pixels alone."""
    edge_weight: Annotated[float, Field(ge=0)] = 0.25
    """beta: weight of the distance between soft edge maps, within that of structure."""
    edge_temperature: Annotated[float, Field(gt=0)] = 0.08
    """tau: how soft an edge map is, in units of the Sobel magnitude of pixels in 0 .. 1."""
    edge_reach: Annotated[int, Field(gt=0)] = 16
    """T: pixels from which on all distances to an edge count alike."""

    def _check_structure(self) -> Iterator[str]:
        own = {"edge_weight", "edge_temperature", "edge_reach"} & self.model_fields_set
        changed = [name for name in sorted(own) if getattr(self, name) != type(self).model_fields[name].default]
        if self.structure_weight == 0 and changed:
            yield (
                f"{changed[0]} = {getattr(self, changed[0])} has no effect with structure_weight = 0; set it to 0.5 as "
                "published, or remove what belongs to it"
            )
