"""One global name per parameter, whatever the pipeline layout, wrapper or layer implementation.

Initial values, exports and comparisons are keyed by these names. They are the names of a one-process model with local
layers: Transformer Engine keeps each norm inside the linear layer that follows it, and a pipeline stage counts its
layers from 0.
"""

from __future__ import annotations

import re

# Part of a Transformer Engine name -> the same part with local layers.
FUSED_NORMS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}
_LAYER = re.compile(r"(?P<prefix>^|.*\.)decoder\.layers\.(?P<index>\d+)\.")


def canonical_name(name: str) -> str:
    """Returns the local layers' name of a parameter that may carry its Transformer Engine name."""
    for fused, separate in FUSED_NORMS.items():
        name = name.replace(fused, separate)
    return name


def transformer_engine_name(name: str) -> str:
    """Returns the Transformer Engine name of a parameter that carries its local layers' name."""
    for fused, separate in FUSED_NORMS.items():
        if ".layers." in name:
            name = name.replace(separate, fused)
    return name


def global_name(name: str, layer_offset: int) -> str:
    """Returns the canonical name with the layer counted over the whole model.

    Args:
        name: from `named_parameters()` of one model chunk, without wrapper prefixes.
        layer_offset: layers that come before this chunk.
    """
    match = _LAYER.match(name)
    if match:
        index = int(match["index"]) + layer_offset
        name = f"{match['prefix']}decoder.layers.{index}.{name[match.end() :]}"
    return canonical_name(name)


def part_name(name: str, layer_offset: int) -> str:
    """Returns the global name of a weight as `freeze` and other settings know it.

    Where megatron-core's schedules look for layers is nothing that a user should have to know.

    Args:
        name: begins with `encoder.` or `objectives.`.
        layer_offset: layers that come before this chunk.
    """
    return global_name(name, layer_offset).replace("encoder.decoder.", "encoder.", 1)
