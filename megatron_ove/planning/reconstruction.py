"""What reconstruction needs on a rank of the last stage: a head on each token, and a frozen teacher."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_ove.config.reconstruction import FeatureReconstructionConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.planning.footprint import ChunkActivations, ObjectiveFootprint, activation_bytes
from megatron_ove.planning.layout import Layout
from megatron_ove.planning.parameters import Parameter

if TYPE_CHECKING:
    from megatron_ove.config.encoder import EncoderConfig


class _HeadFootprint(ObjectiveFootprint):
    """A two-layer head on every token."""

    def size_of(self, config: TrainConfig, name: str) -> int:
        """Returns what the head says of a token."""
        raise NotImplementedError

    def parameters(self, config: TrainConfig, name: str, layout: Layout) -> list[Parameter]:
        width, size = config.encoder.hidden_size, self.size_of(config, name)
        return [
            Parameter("head.fc1.weight", (width, width)),
            Parameter("head.fc1.bias", (width,)),
            Parameter("head.fc2.weight", (size, width)),
            Parameter("head.fc2.bias", (size,)),
        ]

    def activations(self, config: TrainConfig, name: str, layout: Layout) -> ChunkActivations:
        """Tokens, hidden values before and after GELU, what is said, and in fp32 that and what is wanted."""
        tokens, width, size = config.data.tokens_per_microbatch, config.encoder.hidden_size, self.size_of(config, name)
        kept = tokens * (3 * width + size) * activation_bytes(config) + 2 * 4 * tokens * size
        return ChunkActivations(kept, 0, 4 * tokens * size)


class PixelReconstructionFootprint(_HeadFootprint):
    """The pixels of a patch."""

    def size_of(self, config: TrainConfig, name: str) -> int:
        return 3 * config.encoder.patch_size**2


class FeatureReconstructionFootprint(_HeadFootprint):
    """A teacher's features; the teacher keeps no gradients and no activations."""

    def size_of(self, config: TrainConfig, name: str) -> int:
        return _teacher(config, name).hidden_size

    def frozen_bytes(self, config: TrainConfig, name: str, layout: Layout) -> int:
        from megatron_ove.convert.mapping import mcore_shapes

        shapes = mcore_shapes(_teacher(config, name))
        split = ("linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight", "linear_fc1.weight", "linear_fc1.bias")
        split += ("linear_fc2.weight",)
        sizes = (math.prod(one) // (layout.tensor if name.endswith(split) else 1) for name, one in shapes.items())
        return sum(sizes) * activation_bytes(config)


def _teacher(config: TrainConfig, name: str) -> EncoderConfig:
    from megatron_ove.objectives.reconstruction.teacher import read_teacher_config

    section = config.objectives[name]
    assert isinstance(section, FeatureReconstructionConfig)
    return read_teacher_config(section.teacher.path)
