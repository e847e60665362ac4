"""Data sources, one class a kind, and the microbatch token budget.

Where a field takes a number or a list, each sample draws one of the list from its seed; a number that is listed twice
is drawn twice as often.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag

from megatron_ove.config.base import StrictModel

_Positive = Annotated[int, Field(gt=0)]
_Side = Annotated[int, Field(gt=0, le=65535)]
"""No JPEG is longer; and all sizes of a range are listed."""


def _form_of(value: Any) -> str:
    """Which of its forms a value has, so that a mistake is told for that form only."""
    if isinstance(value, dict | SizeRange):
        return "range"
    return "list" if isinstance(value, list | tuple) else "number"


def _form_of_choice(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "number"


_Number = Annotated[_Positive, Tag("number")]
_List = Annotated[Annotated[tuple[_Positive, ...], Field(min_length=1)], Tag("list")]
Choice = Annotated[_Number | _List, Discriminator(_form_of_choice)]
"""A number, or a list of numbers of which each sample draws one."""


class SizeRange(StrictModel):
    """All sizes from `min` to `max` in steps of the patch size; each is drawn equally often."""

    min: _Side
    """Smallest size in pixels; must be a multiple of the patch size."""
    max: _Side
    """Largest size in pixels; must be a multiple of the patch size."""

    def _check_order(self) -> Iterator[str]:
        if self.min > self.max:
            yield (
                f"min = {self.min} is above max = {self.max}, so the range holds no size; use min: {self.max} and "
                f"max: {self.min}"
            )


ImageSize = Annotated[_Number | _List | Annotated[SizeRange, Tag("range")], Discriminator(_form_of)]
"""A size, a list of sizes, or a range of them."""


def list_choices(value: Choice) -> tuple[int, ...]:
    """Returns the numbers of which a sample draws one."""
    return value if isinstance(value, tuple) else (value,)


def _form_of_path(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


SetPath = Annotated[
    Annotated[str, Tag("one")] | Annotated[Annotated[tuple[str, ...], Field(min_length=1)], Tag("several")],
    Discriminator(_form_of_path),
]
"""A folder, or a list of folders."""


class BlockOrder(StrictModel):
    """A random order that a slow disk reads well: blocks of neighbours in random order, mixed within a window.

    An epoch still takes every sample once. Samples of a step come from `window / block` places of the set.
    """

    block: Annotated[int, Field(gt=1)] = 256
    """Neighbouring samples that stay together; they are read one after the other from a shard."""
    window: Annotated[int, Field(gt=1)] = 16384
    """Samples that are mixed with one another, a multiple of `block`; should be many times a step's."""

    def _check_window(self) -> Iterator[str]:
        if self.window % self.block:
            yield (
                f"window = {self.window} is no multiple of block = {self.block}, but a window mixes whole blocks; use "
                f"{max(1, self.window // self.block) * self.block}"
            )


class SourceConfig(StrictModel):
    """What every kind of source has."""

    kind: str
    path: SetPath
    """Folder of a shard set (holds dataset.json), or a list of some whose samples come one set after the other;
    relative paths are relative to the working folder."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of a step's samples that come from this source, relative to the other sources' weights."""

    order: BlockOrder | None = None
    """null = samples come in fully random order, every one a read somewhere else; blocks = neighbours stay together,
    for slow disks."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The folders."""
        return self.path if isinstance(self.path, tuple) else (self.path,)

    @property
    def where(self) -> str:
        """What messages call the folders."""
        more = len(self.paths) - 1
        return self.paths[0] + (f" and {more} more" if more else "")

    def list_budgets(self, patch_size: int) -> tuple[int, ...]:
        """Returns the most patches of a sample, for each draw."""
        raise NotImplementedError

    def without_chance(self) -> Self:
        """Returns the section whose draws have one outcome, the largest where several sizes are listed; for looking at
        what an encoder has learned."""
        return self

    def check_patches(self, patch_size: int) -> Iterator[tuple[str, str]]:
        """Yields (place in the section, sentence) of what does not fit the encoder's patches."""
        return iter(())


class ImageSourceConfig(SourceConfig):
    """Cluster-labelled images: random crop, resize to a square or at its own aspect, random flip."""

    kind: Literal["image"]  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: ImageSize = 224
    """Side of the square in pixels, a multiple of the patch size; a list or a range {min, max} of sides is drawn from
    per sample. No sample has more than (image_size / patch_size)^2 patches, whatever its aspect."""
    aspect: Literal["square", "keep"] = "square"
    """square = the crop is stretched to image_size x image_size; keep = it keeps its aspect, is scaled down to the
    number of patches of such a square, and each side is rounded to whole patches."""
    max_upscale: Annotated[float, Field(ge=1)] = 1.0
    """With `aspect: keep`: how much a crop with fewer patches may be enlarged; 1 = it keeps its native resolution."""
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

    def _check_max_upscale(self) -> Iterator[str]:
        if self.aspect == "square" and self.max_upscale != 1:
            yield (
                f"max_upscale = {self.max_upscale:g} has no effect with aspect: square, which enlarges every crop to "
                "image_size; set aspect: keep or remove max_upscale"
            )

    def named_sizes(self) -> Iterator[tuple[str, int]]:
        """Yields every size that is written in the configuration, with its place there."""
        size = self.image_size
        if isinstance(size, SizeRange):
            yield from (("image_size.min", size.min), ("image_size.max", size.max))
        else:
            yield from (("image_size", one) for one in list_choices(size))

    def check_patches(self, patch_size: int) -> Iterator[tuple[str, str]]:
        for place, size in self.named_sizes():
            if size % patch_size:
                yield (
                    f"{place} = {size}",
                    f"is not a multiple of encoder.patch_size = {patch_size}, so pixels at the edge would be lost; use "
                    f"{size // patch_size * patch_size or patch_size}",
                )

    def without_chance(self) -> Self:
        """Returns the section that shows whole pictures, not mirrored."""
        return self.model_copy(
            update={
                "image_size": max(size for _, size in self.named_sizes()),
                "crop_area": (1.0, 1.0),
                "crop_aspect": (1.0, 1.0),
                "flip_probability": 0.0,
            }
        )

    def list_sizes(self, patch_size: int) -> tuple[int, ...]:
        """Returns the sizes in pixels of which a sample draws one."""
        size = self.image_size
        return tuple(range(size.min, size.max + 1, patch_size)) if isinstance(size, SizeRange) else list_choices(size)

    def list_budgets(self, patch_size: int) -> tuple[int, ...]:
        """Returns the most patches of a sample, for each draw."""
        return tuple((size // patch_size) ** 2 for size in self.list_sizes(patch_size))


class OcrSourceConfig(SourceConfig):
    """Pages with word tags: resized whole with their aspect kept; nothing is cut off and nothing is mirrored."""

    kind: Literal["ocr"]  # pyright: ignore[reportIncompatibleVariableOverride]
    max_patches: Choice = 1024
    """Most patches of a page; a larger page is scaled down to fit. A list is drawn from per sample."""

    def list_budgets(self, patch_size: int) -> tuple[int, ...]:
        """Returns the most patches of a sample, for each draw."""
        return list_choices(self.max_patches)

    def without_chance(self) -> Self:
        """Returns the section with the largest budget."""
        return self.model_copy(update={"max_patches": max(list_choices(self.max_patches))})


class DocumentSourceConfig(SourceConfig):
    """Documents of one or more pages: every page whole, its aspect kept, as a segment of its own."""

    kind: Literal["document"]  # pyright: ignore[reportIncompatibleVariableOverride]
    max_patches: Choice = 1024
    """Most patches of a page; a larger page is scaled down to fit. A list is drawn from per document."""
    max_pages: Annotated[int, Field(gt=0)] = 1
    """Most pages of a document; a set with longer ones is refused."""

    def list_page_budgets(self) -> tuple[int, ...]:
        """Returns the most patches of a page, for each draw."""
        return list_choices(self.max_patches)

    def list_budgets(self, patch_size: int) -> tuple[int, ...]:
        return tuple(self.max_pages * budget for budget in self.list_page_budgets())

    def without_chance(self) -> Self:
        """Returns the section with the largest budget."""
        return self.model_copy(update={"max_patches": max(self.list_page_budgets())})


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


class VideoSourceConfig(SourceConfig):
    """Clips stored as selected patches (mosaics) and frames of the 64-frame grid."""

    kind: Literal["video"]  # pyright: ignore[reportIncompatibleVariableOverride]
    strategies: VideoStrategies = VideoStrategies()
    """Shares of clips that are seen as selected patches, sampled frames or a collage."""
    num_frames: Choice = 8
    """Frames drawn for frame sampling and collage; must divide the stored number of frames. A list is drawn from per
    sample."""
    max_patches: Choice = 2048
    """Most selected patches used of a clip; of a clip that stores more, evenly spaced ones in (t, h, w) order are used.
    A list is drawn from per sample."""

    def list_budgets(self, patch_size: int) -> tuple[int, ...]:
        """Returns the most selected patches of a sample, for each draw."""
        return list_choices(self.max_patches)

    def without_chance(self) -> Self:
        """Returns the section that shows the selected patches of every clip."""
        selected_only = VideoStrategies(codec=1.0, frame_sampling=0.0, collage=0.0)
        return self.model_copy(update={"strategies": selected_only, "max_patches": max(list_choices(self.max_patches))})


class DataConfig(StrictModel):
    """Sources and how their samples are packed into microbatches."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """Source name -> source."""
    tokens_per_microbatch: Annotated[int, Field(gt=0)] = 8192
    """Most patches of a microbatch, padding included; a step has as few microbatches as its samples need."""
    text_tokens_per_microbatch: Annotated[int, Field(gt=0)] | None = None
    """Most text tokens of a microbatch, for objectives that read texts; null = there is none."""
    trim_padding: bool = True
    """Whether the microbatches of a step are cut to its fullest one; false = they always have tokens_per_microbatch
    patches, for kernels that are made for one shape (CUDA graphs, torch.compile)."""
    num_threads: Annotated[int, Field(gt=0)] = 2
    """Decoding threads per replica."""
    read_threads: Annotated[int, Field(gt=0, le=1024)] = 16
    """Reads at a time per replica: a step's samples are read while the step before is decoded."""
    max_bad_samples_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the samples so far (of at least 1,000) that may be unreadable before the run stops with an error. Each
    is tried four times, then replaced by an empty sample without labels and written to the run folder's rejects/."""
    prefetch_steps: Annotated[int, Field(gt=0)] = 2
    """Steps that are decoded, or being decoded, beyond the one that comes next."""
