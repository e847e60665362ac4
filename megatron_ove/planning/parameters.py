"""The encoder's parameters on a rank, and the buffers that megatron-core lays out for them: counted, not built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.planning.layout import Layout

# megatron-core's buffers under the distributed optimizer: parameters start at multiples of 64 elements, and a buffer's
# length is a multiple of 128 and of the number of data ranks.
_PARAMETER_ALIGNMENT, _BUFFER_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class Parameter:
    """A parameter of one rank.

    Attributes:
        name: as in `named_parameters()` of the chunk's encoder.
        shape: this rank's share.
        sums_over_tensor: whether its gradient is summed over the tensor group under sequence parallelism.
    """

    name: str
    shape: tuple[int, ...]
    sums_over_tensor: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def chunk_parameters(encoder: EncoderConfig, layout: Layout, *, stage: int, chunk: int) -> list[Parameter]:
    """Returns the parameters of a model chunk, in the order of the modules of local layers."""
    hidden, parameters = encoder.hidden_size, []
    if layout.is_first(stage, chunk):
        parameters.append(Parameter("patch_embed.weight", (hidden, 3 * encoder.patch_size**2), True))
        parameters += _norm("layernorm_pre", hidden)
    for index in range(len(layout.layers_of(stage, chunk))):
        parameters += _layer(f"decoder.layers.{index}", encoder, layout.tensor)
    if layout.is_last(stage, chunk) and encoder.use_head:
        parameters += _norm("decoder.final_layernorm", hidden) + _pooling_head(encoder)
    return parameters


def _norm(name: str, size: int) -> list[Parameter]:
    return [Parameter(f"{name}.weight", (size,), True), Parameter(f"{name}.bias", (size,), True)]


def _layer(name: str, encoder: EncoderConfig, tensor: int) -> list[Parameter]:
    hidden, ffn = encoder.hidden_size, encoder.ffn_hidden_size
    attention, mlp = f"{name}.self_attention", f"{name}.mlp"
    return [
        *_norm(f"{name}.input_layernorm", hidden),
        Parameter(f"{attention}.linear_proj.weight", (hidden, hidden // tensor)),
        Parameter(f"{attention}.linear_proj.bias", (hidden,), True),
        Parameter(f"{attention}.linear_qkv.weight", (3 * hidden // tensor, hidden)),
        Parameter(f"{attention}.linear_qkv.bias", (3 * hidden // tensor,)),
        *_norm(f"{name}.pre_mlp_layernorm", hidden),
        Parameter(f"{mlp}.linear_fc1.weight", (ffn // tensor, hidden)),
        Parameter(f"{mlp}.linear_fc1.bias", (ffn // tensor,)),
        Parameter(f"{mlp}.linear_fc2.weight", (hidden, ffn // tensor)),
        Parameter(f"{mlp}.linear_fc2.bias", (hidden,), True),
    ]


def _pooling_head(encoder: EncoderConfig) -> list[Parameter]:
    hidden, ffn = encoder.hidden_size, encoder.ffn_hidden_size
    return [
        Parameter("head.probe", (1, 1, hidden)),
        Parameter("head.attention.in_proj_weight", (3 * hidden, hidden)),
        Parameter("head.attention.in_proj_bias", (3 * hidden,)),
        Parameter("head.attention.out_proj.weight", (hidden, hidden)),
        Parameter("head.attention.out_proj.bias", (hidden,)),
        Parameter("head.norm.weight", (hidden,)),
        Parameter("head.mlp.fc1.weight", (ffn, hidden)),
        Parameter("head.mlp.fc1.bias", (ffn,)),
        Parameter("head.mlp.fc2.weight", (hidden, ffn)),
        Parameter("head.mlp.fc2.bias", (hidden,)),
    ]


@dataclass(frozen=True)
class GradientBuffer:
    """The one buffer of a chunk's gradients; under the distributed optimizer its parameters lie in one alike.

    Attributes:
        size: elements, padding included.
        ranges: (start, stop) of each parameter, last parameter first.
    """

    size: int
    ranges: tuple[tuple[int, int], ...]

    def owned(self, data_rank: int, data_size: int) -> list[int]:
        """Returns how many elements of each parameter belong to a data rank's share, for those that have any."""
        share = self.size // data_size
        first, last = data_rank * share, (data_rank + 1) * share
        overlaps = [min(stop, last) - max(start, first) for start, stop in self.ranges]
        return [overlap for overlap in overlaps if overlap > 0]


def gradient_buffer(parameters: list[Parameter], layout: Layout) -> GradientBuffer:
    """Lays parameters out as megatron-core does: in reverse order, aligned under the distributed optimizer."""
    is_aligned = layout.distributed_optimizer
    end, ranges = 0, []
    for parameter in reversed(parameters):
        start = _round_up(end, _PARAMETER_ALIGNMENT) if is_aligned else end
        end = start + parameter.size
        ranges.append((start, end))
    size = _round_up(end, math.lcm(layout.data, _BUFFER_ALIGNMENT)) if is_aligned else end
    return GradientBuffer(size, tuple(ranges))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
