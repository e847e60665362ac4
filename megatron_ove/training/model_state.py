"""The weights of a run's model chunks as sharded tensors: what checkpoints keep of them, and how they come back.

Keys: `model.` the encoder, `modules.<objective>.<module>.` dense weights of objectives. All are in one dictionary per
chunk, because megatron-core's optimizer looks its parameters up there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.utils import sharded_state_dict_default

from megatron_ove.model.parameter_names import global_name
from megatron_ove.optim.optimizer import sharding_metadata
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.build_model import model_of

_ENCODER, _MODULES = "model.", "modules."
_STORED = (ShardedTensor, ShardedTensorFactory)
"""What a weight is stored as; of gated layers, whose gates and ups are shared out each for itself, by a factory."""


def sharded_model_state(chunks: Sequence[DistributedDataParallel], topology: ParallelTopology) -> dict[str, Any]:
    """Returns chunk -> key -> sharded tensor, of all weights of this rank."""
    state = {}
    for index, chunk in enumerate(chunks):
        model, metadata = model_of(chunk), sharding_metadata()
        content: dict[str, Any] = model.encoder.sharded_state_dict(prefix=_ENCODER, metadata=metadata)
        for objective, modules in model.objectives.named_children():
            for name, module in modules.named_children():
                content |= sharded_state_dict_default(
                    module, f"{_MODULES}{objective}.{name}.", metadata=metadata, tp_group=topology.tensor_group
                )
        state[f"chunk{index}"] = content
    return state


def load_model_state(chunks: Sequence[DistributedDataParallel], state: Mapping[str, Any], *, strict: bool) -> None:
    """Gives the model what was read for `sharded_model_state`, or for a part of it.

    Args:
        chunks: of this rank.
        state: chunk -> key -> tensor.
        strict: whether every weight must be there.
    """
    for index, chunk in enumerate(chunks):
        model, content = model_of(chunk), state.get(f"chunk{index}", {})
        model.encoder.load_state_dict(_below(content, _ENCODER), strict=strict)
        model.objectives.load_state_dict(_below(content, _MODULES), strict=strict)


def keep_parts(
    state: Mapping[str, Any], chunks: Sequence[DistributedDataParallel], is_wanted: Callable[[str], bool]
) -> dict[str, Any]:
    """Returns the tensors of `sharded_model_state` whose weights have a wanted name (see `optim/parts.py`)."""
    kept = {}
    for index, chunk in enumerate(chunks):
        offset, content = model_of(chunk).encoder.layer_offset, state.get(f"chunk{index}", {})
        kept[f"chunk{index}"] = {key: item for key, item in content.items() if is_wanted(_part_name(key, offset))}
    return kept


def with_whole_stacks(
    state: Mapping[str, Any], chunks: Sequence[DistributedDataParallel], is_wanted: Callable[[str], bool]
) -> dict[str, Any]:
    """As `keep_parts`, for reading: of layers that lie in one stack with a wanted one, other memory is filled, because
    this rank's part of a stack is read as a whole."""
    wanted = keep_parts(state, chunks, is_wanted)
    stacks = {item.key for content in wanted.values() for item in content.values() if isinstance(item, _STORED)}
    whole = {}
    for chunk, content in state.items():
        beside = {
            key: replace(item, data=torch.empty_like(item.data))
            for key, item in content.items()
            if key not in wanted[chunk] and isinstance(item, _STORED) and item.key in stacks and item.data is not None
        }
        whole[chunk] = {**wanted[chunk], **beside}
    return whole


def with_layers_apart(state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a model's state in which each layer's tensors have a key of their own, instead of lying in one stack with
    those of all layers; the data are the same."""
    return {
        chunk: {key: _apart(item) if isinstance(item, _STORED) else item for key, item in content.items()}
        for chunk, content in state.items()
    }


def _apart(tensor: Any) -> Any:
    if isinstance(tensor, ShardedTensorFactory):
        return replace(tensor, build_fn=lambda *arguments: [_apart(one) for one in tensor.build_fn(*arguments)])
    axes = tensor.prepend_axis_num
    if not axes:
        return tensor
    return replace(
        tensor,
        key=tensor.key.replace("layers.", f"layers.{tensor.global_offset[0]}.", 1),
        global_shape=tensor.global_shape[axes:],
        global_offset=tensor.global_offset[axes:],
        axis_fragmentations=tensor.axis_fragmentations[axes:] if tensor.axis_fragmentations else None,
        prepend_axis_num=0,
    )


def without_scaling_history(state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a model's state without Transformer Engine's extra state."""
    return {
        chunk: {key: item for key, item in content.items() if not key.endswith("_extra_state")}
        for chunk, content in state.items()
    }


def _part_name(key: str, layer_offset: int) -> str:
    if key.startswith(_ENCODER):
        name = global_name("encoder." + key.removeprefix(_ENCODER), layer_offset)
        return name.replace("encoder.decoder.", "encoder.", 1)
    return "objectives." + key.removeprefix(_MODULES)


def _below(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
