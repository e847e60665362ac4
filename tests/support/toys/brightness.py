"""An objective with a layer of its own, and an input for every patch: how bright is it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_ove.batch import Batch
from megatron_ove.config.objectives import ObjectiveConfig
from megatron_ove.kinds import ObjectiveKind
from megatron_ove.objectives.base import Objective, ObjectiveContext
from megatron_ove.outputs import LossTerms, VisionFeatures
from megatron_ove.planning.footprint import ObjectiveFootprint
from megatron_ove.planning.parameters import Parameter


class BrightnessConfig(ObjectiveConfig):
    """Mean brightness of each patch, from its token."""

    kind: Literal["brightness"]


class Brightness(Objective):
    """Squared error of a linear map of tokens."""

    wants_pixels = True

    def __init__(self, name: str, config: BrightnessConfig, context: ObjectiveContext) -> None:
        self.name, self.sources = name, config.sources
        self.layer = nn.Linear(context.embedding_size, 1, device=context.topology.device, dtype=context.dtype)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"layer": self.layer}

    def num_items(self, batch: Batch) -> int:
        return int(self._is_mine(batch).sum())

    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        is_mine = self._is_mine(batch).to(features.tokens.device)
        patches = batch.main.patches
        assert patches is not None
        found = self.layer(features.tokens.squeeze(1)[is_mine]).float().squeeze(1)
        loss = (found - patches[is_mine].float().mean(dim=1) / 255).square().sum()
        return LossTerms(loss, {"loss": (loss.detach(), is_mine.sum().float())})

    def _is_mine(self, batch: Batch) -> Tensor:
        """Returns [P] bool on the CPU: the patches of samples that could be read."""
        pack, samples = batch.main, batch.samples
        is_mine = torch.zeros(len(samples), dtype=torch.bool)
        is_mine[samples.of(*self.sources)] = True
        of_segments = (is_mine & samples.is_valid)[pack.sample.long()]
        of_patches = of_segments.repeat_interleave(pack.cu_seqlens.diff())
        return torch.cat([of_patches, of_patches.new_zeros(pack.num_patches - len(of_patches))])


class _Footprint(ObjectiveFootprint):
    def parameters(self, config, name, layout):
        return [Parameter("layer.weight", (1, config.encoder.hidden_size)), Parameter("layer.bias", (1,))]


OBJECTIVES = {"brightness": ObjectiveKind(config=BrightnessConfig, build=Brightness, footprint=_Footprint)}
