"""The samples of a joint step: pictures, pages and clips in the proportions of the published stage 2, as pixels.

Clips are seen in three ways, by their place in the batch, as published: the first half as patches chosen by a codec on
the grid of 64 frames, the next 40 % as 8 whole frames, one of each 8, the rest as a collage of 8 frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

GRID_FRAMES = 64
CODEC_SHARE, SAMPLING_SHARE = 0.5, 0.4
SOURCES = ("image", "ocr", "video")
STORED_LABELS = {"image": 10, "ocr": 100, "video": 10}
LABELS_PER_STEP = 8
SAMPLE_RATE = 0.1


@dataclass(frozen=True)
class Workload:
    """What both contenders are given.

    Attributes:
        size: of the encoder: base, large, huge.
        num_layers: of the encoder, None = as published.
        samples: source -> samples of the step; the published ratio is 16 : 8 : 16.
        classes: source -> rows of its class table.
        picture_side: of pictures and pages, in pixels; the published recipes train base at 224 and large at 448.
        frame_side: of the frames of clips, in pixels.
        kept_frames: frames drawn of a clip; as many patches as these hold are chosen by the codec.
        precision: bf16 (autocast in the published loop, bf16 with fp32 master weights in ours) or fp32.
    """

    size: str = "base"
    num_layers: int | None = None
    samples: Mapping[str, int] = field(default_factory=lambda: {"image": 2, "ocr": 1, "video": 2})
    classes: Mapping[str, int] = field(default_factory=lambda: {"image": 200_000, "ocr": 36_519, "video": 40_000})
    picture_side: int = 224
    frame_side: int = 224
    kept_frames: int = 8
    precision: str = "bf16"
    device: str = "cpu"

    def draw(self, step: int, patch_size: int) -> StepSamples:
        """Returns the samples of a step, on the CPU; the same for both contenders."""
        generator = torch.Generator().manual_seed(step)
        sizes = {
            "image": (3, self.picture_side, self.picture_side),
            "ocr": (3, self.picture_side, self.picture_side),
            "video": (GRID_FRAMES, 3, self.frame_side, self.frame_side),
        }
        pixels = {
            name: torch.randint(256, (self.samples[name], *size), generator=generator, dtype=torch.uint8)
            for name, size in sizes.items()
        }
        labels = {
            name: torch.randint(
                self.classes[name], (self.samples[name], STORED_LABELS[name]), generator=generator, dtype=torch.int32
            )
            for name in SOURCES
        }
        per_frame = (self.frame_side // patch_size) ** 2
        clips = self.samples["video"]
        num_codec = int(clips * CODEC_SHARE)
        num_sampled = int(clips * SAMPLING_SHARE)
        kept = self.kept_frames * per_frame
        chosen = [torch.randperm(GRID_FRAMES * per_frame, generator=generator)[:kept] for _ in range(num_codec)]
        bins = GRID_FRAMES // self.kept_frames
        frames = torch.randint(bins, (clips - num_codec, self.kept_frames), generator=generator)
        frames += bins * torch.arange(self.kept_frames)
        whole = frames[:num_sampled, :, None] * per_frame + torch.arange(per_frame)
        by_codec = torch.stack(chosen).sort(1).values if chosen else whole.new_zeros(0, kept)
        visible = torch.cat([by_codec, whole.flatten(1)])
        return StepSamples(pixels, labels, visible, frames[num_sampled:])


@dataclass(frozen=True)
class StepSamples:
    """Of one step.

    Attributes:
        pixels: source -> uint8 [b, 3, H, W]; of clips [b, 64, 3, H, W], all frames.
        labels: source -> [b, L] int32.
        visible: [v, K] int64, patches on the 64-frame grid of the first v clips: a codec's, then whole frames'.
        collage_frames: [b - v, F] int64, frames of the other clips, which are stacked into one picture.
    """

    pixels: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    visible: Tensor
    collage_frames: Tensor
