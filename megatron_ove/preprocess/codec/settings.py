"""What the patch selection can be told; stored with every set of clips, because the selection depends on all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

import av

from megatron_ove.errors import DataError

_READING = 2
"""Counts up when the same clip and settings give other frames. 2: a grid even in time, only frames that are shown."""


@dataclass(frozen=True)
class CodecSettings:
    """Frame grid, patch budget, and the constants of the energy.

    Raises:
        DataError: sizes that do not fit each other.
    """

    num_frames: int = 64
    """Frames of the uniform time grid."""
    frame_height: int = 224
    """Height of a grid frame in pixels; a multiple of `patch_size`."""
    frame_width: int = 224
    """Width of a grid frame in pixels; a multiple of `patch_size`."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    patch_budget: int = 2048
    """Most patches kept of a clip, those of the first frame included."""
    fit: Literal["crop", "letterbox"] = "crop"
    """How a clip of another shape fills a frame: the centre of it, or all of it between grey bars."""
    min_score: float = 0.08
    """Least energy (0..1) of a patch worth keeping: a still clip keeps fewer patches instead of noise."""
    max_frame_share: float = 0.75
    """Largest part of one later frame that may be kept, so that a scene cut does not eat the budget."""
    motion_weight: float = 1.0
    """Weight of camera-compensated motion in the energy."""
    residual_weight: float = 1.0
    """Weight of the prediction residual in the energy."""
    percentile: float = 95.0
    """Per-frame percentile that counts as full motion or residual."""
    motion_floor: float = 1.0
    """Least motion, in pixels, that may count as full."""
    residual_floor: float = 4.0
    """Least residual, in grey levels, that may count as full."""
    noise_level: float = 2.0
    """Residual, in grey levels, taken as coding noise and subtracted."""
    gate_level: float = 6.0
    """Mean camera-compensated difference, in grey levels, above which a motion vector is fully believed."""
    crf: int = 23
    """x264 quality of the analysed chain."""
    preset: str = "veryfast"
    """x264 preset of the analysed chain."""

    def __post_init__(self) -> None:
        for name, size in (("frame_height", self.frame_height), ("frame_width", self.frame_width)):
            if size % self.patch_size or size % 2:
                raise DataError(
                    f"{name} = {size} must be an even multiple of patch_size = {self.patch_size}, because frames are "
                    f"cut into whole patches and x264 needs even sides; {self._nearest_size(size)} would do"
                )
        if self.num_frames < 1:
            raise DataError(f"num_frames = {self.num_frames}, but a clip needs at least one frame")
        if self.patch_budget < self.patches_per_frame:
            raise DataError(
                f"patch_budget = {self.patch_budget} is less than the {self.patches_per_frame} patches of the first "
                "frame, which is always kept whole; raise the budget or choose a smaller frame"
            )

    @property
    def grid_height(self) -> int:
        return self.frame_height // self.patch_size

    @property
    def grid_width(self) -> int:
        return self.frame_width // self.patch_size

    @property
    def patches_per_frame(self) -> int:
        return self.grid_height * self.grid_width

    def as_record(self) -> dict[str, object]:
        """Returns the settings and the versions they were run with, ready for JSON."""
        libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
        return {**asdict(self), "reading": _READING, "pyav": av.__version__, "ffmpeg_libraries": libraries}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> CodecSettings:
        """Rebuilds settings from `as_record`; version entries are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})  # type: ignore[arg-type]

    def _nearest_size(self, size: int) -> int:
        step = self.patch_size if self.patch_size % 2 == 0 else 2 * self.patch_size
        return max(step, round(size / step) * step)
