"""Initial weights as a function of (seed, global parameter name): equal for every layout and layer implementation.

Each rank draws the whole tensor and keeps its slice. megatron-core's own initialisation depends on the order in which
modules are built, hence on the pipeline layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron_ove.model.parameter_names import global_name
from megatron_ove.parallel.random import stateless_generator


def initialize_parameters(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    seed: int,
    initializer_range: float,
    layer_offset: int,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Fills parameters in place.

    Args:
        parameters: `named_parameters()` of one model chunk, with megatron-core's tensor-parallel attributes.
        seed: of the run.
        initializer_range: standard deviation of weights.
        layer_offset: layers that come before this chunk.
        tensor_rank, tensor_size: this rank's place in the tensor group.
    """
    fill_parameters(
        parameters,
        lambda name, shape: initial_value(name, shape, seed=seed, initializer_range=initializer_range),
        layer_offset=layer_offset,
        tensor_rank=tensor_rank,
        tensor_size=tensor_size,
    )


def fill_parameters(
    parameters: Iterable[tuple[str, nn.Parameter]],
    value_of: Callable[[str, list[int]], Tensor],
    *,
    layer_offset: int,
    tensor_rank: int,
    tensor_size: int,
    is_wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Gives parameters this rank's share of whole tensors, in place.

    Args:
        parameters: as for `initialize_parameters`.
        value_of: (global name, full shape) -> the whole tensor.
        layer_offset, tensor_rank, tensor_size: as for `initialize_parameters`.
        is_wanted: whether a parameter with this global name is filled.
    """
    for local_name, parameter in parameters:
        name = global_name(local_name, layer_offset)
        if not is_wanted(name):
            continue
        shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", -1)
        is_sharded = getattr(parameter, "tensor_model_parallel", False) and tensor_size > 1
        if is_sharded:
            shape[dim] *= tensor_size
        full = value_of(name, shape)
        with torch.no_grad():
            parameter.copy_(_share(full, parameter, dim, tensor_rank, tensor_size) if is_sharded else full)


def _share(full: Tensor, parameter: nn.Parameter, dim: int, rank: int, size: int) -> Tensor:
    """Returns a rank's part of a whole tensor; of a gated layer, whose stride is 2, a part of the gates and then one of
    the ups."""
    stacked = full.chunk(getattr(parameter, "partition_stride", 1), dim)
    return torch.cat([one.chunk(size, dim)[rank] for one in stacked], dim)


def initial_value(name: str, shape: list[int], *, seed: int, initializer_range: float) -> Tensor:
    """Returns the initial value of the parameter with this global name and full shape: fp32 on the CPU.

    Weights N(0, initializer_range), biases and offsets 0, norms 1, the pooling query N(0, 1), and the pooling head's
    joint projection Xavier-uniform. Source: OneVision-Encoder; the last is torch's default for MultiheadAttention.
    """
    module, _, kind = name.rpartition(".")
    if kind.endswith(("bias", "offset")):
        return torch.zeros(shape)
    if kind == "weight" and module.endswith(("norm", "layernorm_pre")):
        return torch.ones(shape)
    generator = stateless_generator(seed, "initial value", name)
    if kind == "in_proj_weight":
        bound = math.sqrt(6 / (shape[0] + shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    scale = 1.0 if kind == "probe" else initializer_range
    return torch.empty(shape).normal_(0, scale, generator=generator)
