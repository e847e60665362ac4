"""The published training step, written plainly from its description: what ours is compared with.

Each head in turn: a forward of its own through the encoder, as dense batches of equal samples. Pictures and pages are
whole squares. A clip arrives as all 64 frames in fp32: they are cut into patches, the 2,048 chosen ones are gathered
and put together again as a clip of 8 frames, which goes through the encoder with the positions of the 64-frame grid;
clips of the third kind are 8 frames stacked into one picture, and take one more forward. So three heads are four
forwards, whose activations all live until one backward pass. Attention is eager. Weights are fp32, the encoder runs
under bf16 autocast (or in fp32), pooled embeddings are cast to fp32 for the heads (`published_head.py`: 8 class sets,
dense gradient, dense AdamW). One AdamW with weight decay on every parameter of the encoder; gradients clipped at 5, the
encoder's and each head's by themselves.

Left out, in its favour: DistributedDataParallel, host syncs of its logging, accumulation that reduces in every
microstep. On a GPU the publication wraps the encoder in torch.compile; here it is not compiled.

Source: OneVision-Encoder, training/train.py, by its description.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from plain_vit import PlainVit
from published_head import PublishedHead
from torch import Tensor
from train_step_work import LABELS_PER_STEP, StepSamples

from megatron_ove.training.step_timers import StepTimers

CLIP_GRAD_NORM, WEIGHT_DECAY = 5.0, 0.05


class PublishedLoop:
    """The encoder, a head for each source, and their optimizers."""

    def __init__(
        self, encoder: PlainVit, heads: Mapping[str, PublishedHead], *, lr: float, autocast: bool, timers: StepTimers
    ) -> None:
        """
        Args:
            encoder: with eager attention, fp32 weights.
            heads: source -> head, in the order of their forwards.
            lr: of the encoder.
            autocast: whether the encoder computes in bf16.
            timers: told what is being done.
        """
        self._encoder, self._heads, self._autocast, self._timers = encoder, heads, autocast, timers
        self._optimizer = torch.optim.AdamW(encoder.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)

    def step(self, pixels: Mapping[str, Tensor], samples: StepSamples) -> Tensor:
        """Does one optimizer step; returns the sum of the heads' losses.

        Args:
            pixels: source -> normalised fp32 pixels, shapes as in `StepSamples`.
            samples: labels, chosen patches, collages; on the encoder's device.
        """
        timers = self._timers
        with timers.phase("forward"):
            embeddings = self.embed(pixels, samples)
        with timers.phase("head"):
            losses = [head.loss(embeddings[name], _draw(samples.labels[name])) for name, head in self._heads.items()]
            total = torch.stack(losses).sum()
        with timers.phase("backward"):
            total.backward()
        with timers.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self._encoder.parameters(), CLIP_GRAD_NORM)
            self._optimizer.step()
            self._optimizer.zero_grad()
            for head in self._heads.values():
                head.update()
        return total.detach()

    def embed(self, pixels: Mapping[str, Tensor], samples: StepSamples) -> dict[str, Tensor]:
        """Returns source -> pooled embeddings [b, h] fp32: four forwards."""
        return {
            "image": self._forward(pixels["image"][:, None]),
            "ocr": self._forward(pixels["ocr"][:, None]),
            "video": self._embed_clips(pixels["video"], samples),
        }

    def _embed_clips(self, clips: Tensor, samples: StepSamples) -> Tensor:
        """[b, 64, 3, H, W] -> [b, h]."""
        visible, frames = samples.visible, samples.collage_frames
        parts, patch = [], self._encoder.config.patch_size
        side, num_visible = clips.shape[-1] // patch, len(visible)
        if num_visible:
            rows = clips[:num_visible].unflatten(-2, (side, patch)).unflatten(-1, (side, patch))
            rows = rows.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # [v, 64 * side^2, 3 * p * p]
            rows = rows.gather(1, visible[..., None].expand(-1, -1, rows.shape[-1]))
            packed = rows.view(num_visible, -1, side, side, 3, patch, patch).permute(0, 1, 4, 2, 5, 3, 6)
            packed = packed.reshape(num_visible, -1, 3, side * patch, side * patch)  # [v, 8, 3, H, W]
            positions = [visible // side**2, visible // side % side, visible % side]
            parts.append(self._forward(packed, torch.stack(positions, dim=-1)))
        if len(frames):
            index = torch.arange(num_visible, len(clips), device=clips.device)[:, None]
            stacked = clips[index, frames].transpose(1, 2).flatten(2, 3)  # [b - v, 3, 8 * H, W]
            parts.append(self._forward(stacked[:, None]))
        return torch.cat(parts)

    def _forward(self, pixels: Tensor, positions: Tensor | None = None) -> Tensor:
        """[b, T, 3, H, W] -> [b, h] fp32; without positions they are the grid's own, at t = 0."""
        if positions is None:
            rows, columns = (size // self._encoder.config.patch_size for size in pixels.shape[-2:])
            index = torch.arange(rows * columns, device=pixels.device)
            positions = torch.stack([torch.zeros_like(index), index // columns, index % columns], dim=-1)
            positions = positions.expand(len(pixels), -1, -1)
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            pooled = self._encoder(pixels, positions)
        return pooled.float()


def _draw(labels: Tensor) -> Tensor:
    """Returns 8 of a sample's labels in random order."""
    order = torch.rand(labels.shape, device=labels.device).argsort(1)[:, :LABELS_PER_STEP]
    return labels.long().gather(1, order)
