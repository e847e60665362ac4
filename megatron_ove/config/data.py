"""Data sources: a tagged union by kind (image, ocr, video) and the microbatch token budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_ove.config.base import StrictModel


class _SourceConfig(StrictModel):
    """What every kind of source has."""

    path: str
    """Folder of a shard set (holds dataset.json); relative paths are relative to the working folder."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of a step's samples that come from this source, relative to the other sources' weights."""


class ImageSourceConfig(_SourceConfig):
    """Cluster-labelled images: random crop, resize to a square, random flip."""

    kind: Literal["image"]
    image_size: Annotated[int, Field(gt=0)] = 224
    """Side of the square crop in pixels; must be a multiple of the patch size."""
    crop_area: tuple[float, float] = (0.7, 1.0)
    """Range of the crop's share of the picture's area."""
    crop_aspect: tuple[float, float] = (0.8, 1.25)
    """Range of the crop's width / height relative to the picture's."""
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of a horizontal flip."""

    def _check_crop_area(self) -> Iterator[str]:
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            yield (
                f"crop_area = {self.crop_area} is no range within 0 .. 1, but a crop covers a share of the picture; "
                "use e.g. [0.7, 1.0]"
            )

    def _check_crop_aspect(self) -> Iterator[str]:
        low, high = self.crop_aspect
        if not 0 < low <= high:
            yield (
                f"crop_aspect = {self.crop_aspect} is no range of positive numbers, lowest first; use e.g. [0.8, 1.25]"
            )


class OcrSourceConfig(_SourceConfig):
    """Pages with word tags: resized whole with their aspect kept; nothing is cut off and nothing is mirrored."""

    kind: Literal["ocr"]
    max_patches: Annotated[int, Field(gt=0)] = 1024
    """Most patches of a page; a larger page is scaled down to fit."""


class VideoStrategies(StrictModel):
    """How a clip becomes patches: shares of clips per strategy, drawn per sample. They must add up to 1."""

    codec: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Patches selected by motion and residual energy, at their place on the 64-frame grid."""
    frame_sampling: Annotated[float, Field(ge=0, le=1)] = 0.375
    """Whole frames, one drawn from each of `num_frames` equal bins, at their place on the 64-frame grid."""
    collage: Annotated[float, Field(ge=0, le=1)] = 0.125
    """The same frames stacked vertically into one picture: t = 0, h = grid height * frame + row."""

    def _check_sum(self) -> Iterator[str]:
        total = self.codec + self.frame_sampling + self.collage
        if abs(total - 1.0) > 1e-6:
            yield (
                f"codec + frame_sampling + collage = {total:g}, but they are shares of all clips and must add up to 1; "
                "change one of the three"
            )


class VideoSourceConfig(_SourceConfig):
    """Clips stored as selected patches (mosaics) and frames of the 64-frame grid."""

    kind: Literal["video"]
    strategies: VideoStrategies = VideoStrategies()
    """Shares of clips that are seen as selected patches, sampled frames or a collage."""
    num_frames: Annotated[int, Field(gt=0)] = 8
    """Frames drawn for frame sampling and collage; must divide the stored number of frames."""
    max_patches: Annotated[int, Field(gt=0)] = 2048
    """Most selected patches used of a clip; a clip that stores more keeps its first ones in (t, h, w) order."""


SourceConfig = Annotated[ImageSourceConfig | OcrSourceConfig | VideoSourceConfig, Field(discriminator="kind")]


class DataConfig(StrictModel):
    """Sources and how their samples are packed into microbatches."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """Source name -> source."""
    tokens_per_microbatch: Annotated[int, Field(gt=0)] = 8192
    """Patches of a microbatch, padding included; samples of a step are packed first-fit into such budgets."""
    num_threads: Annotated[int, Field(gt=0)] = 2
    """Decoding threads per replica."""
    prefetch_steps: Annotated[int, Field(gt=0)] = 2
    """Steps decoded ahead of training."""
