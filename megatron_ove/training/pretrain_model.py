"""`PretrainModel`: what megatron-core's schedules drive. The encoder, and on the last stage the objectives.

The dense weights of objectives are children of it. Tables of rows are not: `ObjectiveSet` is a plain object, so neither
DistributedDataParallel nor Float16Module sees them, and their rows are updated by their own optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import ModuleDict

from megatron_ove.batch import Batch
from megatron_ove.model.encoder_chunk import EncoderChunk
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.outputs import Observed, StepOutput, VisionFeatures
from megatron_ove.training.step_timers import StepTimers
from megatron_ove.training.timed_head import timed_head


class PretrainModel(MegatronModule):
    """One model chunk with what follows it in training."""

    # Read by megatron-core's schedules and when gradients are finalized.
    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(self, encoder: EncoderChunk, objectives: ObjectiveSet | None) -> None:
        """
        Args:
            encoder: this chunk of the encoder.
            objectives: on the last chunk of the last stage; None elsewhere.
        """
        super().__init__(encoder.config)
        self.vp_stage = encoder.vp_stage
        self.pre_process, self.post_process = encoder.pre_process, encoder.post_process
        self.encoder = encoder
        self.objective_set = objectives
        self.objectives = objectives.modules if objectives else ModuleDict()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Takes what the stage before sent; called by the schedule."""
        self.encoder.set_input_tensor(input_tensor)

    def forward(
        self,
        batch: Batch,
        scales: Mapping[str, float] | None,
        observe: Callable[[VisionFeatures, Batch], Any] | None = None,
    ) -> Tensor | StepOutput | Observed:
        """Runs this chunk on one microbatch.

        Args:
            batch: the microbatch, identical on the tensor-parallel ranks.
            scales: objective name -> factor of its loss sum (see `loss_scales`); used on the last chunk. None = no
                loss: `observe` looks at the features instead.
            observe: on the last stage, without scales.

        Returns:
            [P, 1, h] hidden states ([P / tp, 1, h] under sequence parallelism) for the next chunk; a `StepOutput`
            from the last one, or without scales what was `Observed`.
        """
        output = self.encoder(batch.main)
        if self.objective_set is None:
            return output
        if not isinstance(output, VisionFeatures):
            raise TypeError(f"the last chunk of the encoder returned {type(output).__name__}, not VisionFeatures")
        if scales is None:
            assert observe is not None, "without scales there is something to observe"
            return Observed(observe(output, batch))
        timers: StepTimers | None = self.config.timers  # type: ignore[assignment]  # megatron-core says "a callable"
        if timers is None:
            return self.objective_set.forward(output, batch, scales)
        return timed_head(timers, self.objective_set, output, batch, scales)
