"""`EncoderChunk`: what a run asks of an encoder of any kind, or of the part of it that one model chunk holds."""

from __future__ import annotations

from abc import abstractmethod

from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ove.batch import PatchPack
from megatron_ove.outputs import VisionFeatures


class EncoderChunk(MegatronModule):
    """One model chunk of an encoder. Parameters carry megatron-core's tensor-parallel attributes.

    Attributes:
        pre_process: whether this chunk is given patches.
        post_process: whether this chunk ends in features.
        vp_stage: index of this chunk among the chunks of its rank; None without a virtual pipeline.
        layer_offset: layers of the whole model that come before this chunk.
    """

    # Read by megatron-core's pipeline schedules and gradient finalisation.
    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    pre_process: bool
    post_process: bool
    vp_stage: int | None
    layer_offset: int

    @abstractmethod
    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Takes what the chunk before sent: [P(/tp under sequence parallelism), 1, h]; called by the schedule."""

    @abstractmethod
    def forward(self, pack: PatchPack) -> Tensor | VisionFeatures:
        """Returns `VisionFeatures` on the last chunk, what is sent to the next one elsewhere."""
