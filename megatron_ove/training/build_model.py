"""Encoder and objectives' modules -> PretrainModel -> Float16Module (bf16) -> DistributedDataParallel, one per model
chunk of this rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor

from megatron_ove.config.train import TrainConfig
from megatron_ove.model.parameter_names import part_name
from megatron_ove.model.pooling import AttentionPoolingHead
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.optim.parts import is_in_any
from megatron_ove.parallel import gradient_buckets
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.determinism import use_deterministic_kernels
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
    if config.train.deterministic and topology.device.type == "cuda":
        use_deterministic_kernels()
    encoders = config.kinds.encoders[config.encoder.kind].build(
        config.encoder, topology, dtype=weight_dtype(config), seed=config.seed, has_gradient_buffers=True
    )
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=gradient_buckets.bucket_size(topology.data_size),
    )
    chunks = []
    for index, encoder in enumerate(encoders):
        is_last = topology.is_last_chunk(encoder.vp_stage)
        model = PretrainModel(encoder, objectives if is_last else None)
        _average_replicated_gradients(model, sequence_parallel=encoder.config.sequence_parallel)
        for name, parameter in _named_parameters(model):
            if is_in_any(name, config.freeze):  # before the wrappers, which would make room for its gradient
                parameter.requires_grad_(False)
        module: MegatronModule = model
        if config.train.precision == "bf16":
            module = Float16Module(encoder.config, module)
        encoder.config.finalize_model_grads_func = finalize_model_grads
        chunk = DistributedDataParallel(
            encoder.config, ddp_config, module, disable_bucketing=index > 0, pg_collection=topology.process_groups
        )
        head = getattr(encoder, "head", None)
        if parallel.overlap_param_gather and isinstance(head, AttentionPoolingHead):
            _gather_before_pooling(chunk, head)
        chunks.append(chunk)
    if parallel.overlap_grad_reduce:
        # Only the step's last microbatch starts the reduction; all chunks share one configuration.
        holds = [chunk.no_sync for chunk in chunks]
        chunks[0].config.no_sync_func = holds if len(holds) > 1 else holds[0]
    return chunks


def parameter_names(chunks: Sequence[DistributedDataParallel]) -> dict[Tensor, str]:
    """Returns parameter -> its name in the whole model (see `optim/parts.py`), frozen ones included."""
    return {parameter: name for chunk in chunks for name, parameter in _named_parameters(model_of(chunk))}


def _named_parameters(model: PretrainModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield part_name(name, model.encoder.layer_offset), parameter


def _average_replicated_gradients(model: PretrainModel, *, sequence_parallel: bool) -> None:
    """Has megatron-core average gradients that every tensor-parallel rank computes in full.

    They are equal by arithmetic, but kernels that add in changing order make them differ in the last bits, and the
    ranks' copies of a weight would drift apart over a long run.
    """
    for parameter in model.parameters():
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        is_summed = sequence_parallel and getattr(parameter, "sequence_parallel", False)
        if not is_sharded and not is_summed:
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]


def _gather_before_pooling(chunk: DistributedDataParallel, head: AttentionPoolingHead) -> None:
    """Waits for the weights of the head's attention, a module that is never called and so has no hook of its own."""

    def gather(*_: object) -> None:
        for parameter in head.attention.parameters(recurse=False):
            if parameter.requires_grad:
                chunk.param_to_bucket_group[parameter].finish_param_sync()

    head.register_forward_pre_hook(gather)


def model_of(chunk: DistributedDataParallel) -> PretrainModel:
    """Returns the model inside a wrapped chunk."""
    module = chunk.module
    model = module.module if isinstance(module, Float16Module) else module
    assert isinstance(model, PretrainModel)
    return model
