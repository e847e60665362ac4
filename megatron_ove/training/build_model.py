"""Encoder -> PretrainModel -> Float16Module (bf16) -> DistributedDataParallel, one per model chunk of this rank."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_ove.config.train import TrainConfig
from megatron_ove.model.encoder import VisionEncoder, build_encoder_chunks
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.pretrain_model import PretrainModel


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """Returns the dtype of weights and activations."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def build_model_chunks(
    config: TrainConfig, topology: ParallelTopology, objectives: ObjectiveSet | None
) -> list[DistributedDataParallel]:
    """Builds this rank's chunks of the model, with equal weights for every layout; collective.

    Gradients are kept and reduced in fp32 and averaged over the data ranks.

    Args:
        config: the run.
        topology: this rank's place.
        objectives: on the last pipeline stage; None elsewhere.
    """
    encoders = build_encoder_chunks(config.encoder, topology, dtype=weight_dtype(config), seed=config.seed)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.parallel.use_distributed_optimizer
    )
    chunks = []
    for index, encoder in enumerate(encoders):
        is_last = topology.is_last_chunk(encoder.vp_stage)
        module: MegatronModule = PretrainModel(encoder, objectives if is_last else None)
        if config.train.precision == "bf16":
            module = Float16Module(encoder.config, module)
        encoder.config.finalize_model_grads_func = finalize_model_grads
        chunk = DistributedDataParallel(
            encoder.config, ddp_config, module, disable_bucketing=index > 0, pg_collection=topology.process_groups
        )
        chunks.append(chunk)
    return chunks


def encoder_of(chunk: DistributedDataParallel) -> VisionEncoder:
    """Returns the encoder inside a wrapped chunk."""
    module = chunk.module
    model = module.module if isinstance(module, Float16Module) else module
    assert isinstance(model, PretrainModel)
    return model.encoder
