"""`FeatureReconstruction` and `PixelReconstruction`: a two-layer head on each token says what was there.

Both heads are thrown away after training. Items are tokens, so a large picture counts as much as its patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.reconstruction import FeatureReconstructionConfig, PixelReconstructionConfig
from megatron_ove.objectives.base import Objective, ObjectiveContext
from megatron_ove.objectives.reconstruction.pictures import to_pictures
from megatron_ove.objectives.reconstruction.segment_groups import Grid, SegmentGroups, group_segments
from megatron_ove.objectives.reconstruction.structure import structure_distance
from megatron_ove.objectives.reconstruction.teacher import Teacher
from megatron_ove.outputs import LossTerms, VisionFeatures

if TYPE_CHECKING:
    from megatron_ove.data.sample_reader import SampleReader


class TokenHead(nn.Module):
    """Two linear maps with GELU between them, token by token; replicated over the tensor group."""

    def __init__(self, width: int, size: int, **placement: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width, **placement)
        self.fc2 = nn.Linear(width, size, **placement)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [n, width] to [n, size]."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class _Reconstruction(Objective):
    """What both have in common: which tokens, and a head on them."""

    wants_pixels = True

    def __init__(self, name: str, sources: tuple[str, ...], context: ObjectiveContext, size: int) -> None:
        self.name, self.sources = name, sources
        self._device = context.topology.device
        self.head = TokenHead(context.embedding_size, size, device=self._device, dtype=context.dtype)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"head": self.head}

    def collate(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> SegmentGroups:
        return group_segments(samples, pack, self.sources, self._device, self._shown)

    def num_items(self, batch: Batch) -> int:
        """Returns the number of tokens."""
        return batch.inputs[self.name].num_tokens

    def observe_held_out(self, features: VisionFeatures, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        return self.forward(features, batch).metrics

    def measure_held_out(
        self, observed: Sequence[Any], inputs: Sequence[Any], sample_counts: np.ndarray
    ) -> Mapping[str, tuple[Tensor | float, Tensor | float]]:
        """Returns the metrics of training."""
        del sample_counts
        names = [name for one in observed[:1] for name in one]
        pictures = sum(group.count for one in inputs for group in one.groups)
        return {"samples": (float(pictures), 1.0)} | {
            name: (sum(float(one[name][0]) for one in observed), sum(float(one[name][1]) for one in observed))
            for name in names
        }

    def _shown(self, grid: Grid) -> Grid:
        return grid


class FeatureReconstruction(_Reconstruction):
    """Sum over tokens of (1 - cosine) + mu * smooth L1, the mean over channels, between head(token) and a frozen
    teacher's feature. Source: UNIT (Zhu et al., 2024), section 3.2; RADIO (Ranzinger et al., 2024) for mu."""

    def __init__(self, name: str, config: FeatureReconstructionConfig, context: ObjectiveContext) -> None:
        self._teacher = Teacher(config.teacher, context.topology, context.dtype)
        super().__init__(name, config.sources, context, self._teacher.width)
        self._mu = config.smooth_l1_weight

    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        groups: SegmentGroups = batch.inputs[self.name].to(self._device)
        said = self.head(features.tokens.squeeze(1)[groups.rows(self._device)]).float()  # [n, e]
        wanted = self._teacher.features(batch.main, groups) if groups.groups else said.detach()
        cosine = F.cosine_similarity(said, wanted, dim=-1)
        distance = F.smooth_l1_loss(said, wanted, reduction="none").mean(dim=-1)
        loss = (1 - cosine + self._mu * distance).sum()
        count = torch.tensor(float(len(said)), device=loss.device)
        return LossTerms(loss, {"loss": (loss.detach(), count), "cosine": (cosine.detach().sum(), count)})

    def _shown(self, grid: Grid) -> Grid:
        return self._teacher.shown(grid)


class PixelReconstruction(_Reconstruction):
    """Sum over tokens of the mean squared error of their pixels, in 0 .. 1, and of structure: see `structure.py`.
    Source: MonkeyOCRv2 (2026), section 3."""

    def __init__(self, name: str, config: PixelReconstructionConfig, context: ObjectiveContext) -> None:
        super().__init__(name, config.sources, context, 3 * context.patch_size**2)
        self._config = config

    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        groups: SegmentGroups = batch.inputs[self.name].to(self._device)
        rows = groups.rows(self._device)
        assert batch.main.patches is not None
        said = self.head(features.tokens.squeeze(1)[rows]).float()  # [n, 3 * p * p]
        wanted = batch.main.patches[rows].float() / 255
        squares = F.mse_loss(said, wanted, reduction="none").mean(dim=-1).sum()
        loss, count = squares, torch.tensor(float(len(said)), device=said.device)
        metrics = {"squared_error": (squares.detach(), count)}
        if self._config.structure_weight:
            structure = self._structure(said, wanted, groups)
            loss = loss + self._config.structure_weight * structure
            metrics["structure"] = (structure.detach(), count)
        return LossTerms(loss, {"loss": (loss.detach(), count), **metrics})

    def _structure(self, said: Tensor, wanted: Tensor, groups: SegmentGroups) -> Tensor:
        """Returns the sum over tokens of the structural distance of their pictures."""
        config, total, start = self._config, said.new_zeros(()), 0
        for group in groups.groups:
            stop = start + group.count * group.length
            frames, height, width = group.grid
            if frames:  # patches that are no full grid have no neighbours to form edges with
                pictures = (to_pictures(x[start:stop], group.count * frames, height, width) for x in (said, wanted))
                distances = structure_distance(
                    *pictures,
                    edge_weight=config.edge_weight,
                    temperature=config.edge_temperature,
                    reach=config.edge_reach,
                )
                total = total + distances.sum() * (height * width)
            start = stop
        return total
