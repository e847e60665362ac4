"""The two-way table between the encoder's parameters and the published HuggingFace names and shapes.

Both sides are whole tensors of a one-process model. Two differences besides names: megatron-core keeps q, k and v of
each head together in one matrix, and the patch embedding is flattened. Every conversion moves values only, so a round
trip is bit-exact, and it is linear, so it maps gradients as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.errors import CheckpointError
from megatron_ove.model.parameter_names import canonical_name

_LAYER_NAMES = {
    "input_layernorm": "layer_norm1",
    "self_attention.linear_proj": "self_attn.out_proj",
    "pre_mlp_layernorm": "layer_norm2",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}
# The head's parameters carry the published names already.
_HEAD_NAMES = (
    "probe",
    *(f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
    "norm.weight",
    *(f"mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")),
)
# How many keys of a kind an error names before it only counts.
_MAX_NAMED_KEYS = 4


@dataclass(frozen=True)
class _Entry:
    """One megatron-core tensor and the published tensors it corresponds to."""

    mcore: str
    hf: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[..., Tensor]


def to_hf(mcore_state: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Converts a full state to the published form.

    Args:
        mcore_state: `VisionEncoder` state of one process; names of either layer spec; `_extra_state` is ignored.
        config: the encoder.

    Returns:
        Published names to contiguous tensors, dtypes kept.

    Raises:
        CheckpointError: names or shapes are not those of `config`.
    """
    state = {canonical_name(name): value for name, value in mcore_state.items() if not name.endswith("_extra_state")}
    check_state(state, mcore_shapes(config), what="the encoder state")
    result: dict[str, Tensor] = {}
    for entry in _entries(config):
        for name, part in zip(entry.hf, entry.split(state[entry.mcore]), strict=True):
            result[name] = part.contiguous()
    return result


def to_mcore(hf_state: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Converts a published state to the full state of a one-process `VisionEncoder` with local layers.

    Args:
        hf_state: published names to tensors.
        config: the encoder.

    Raises:
        CheckpointError: names or shapes are not those of `config`.
    """
    check_state(hf_state, hf_shapes(config), what="the HuggingFace state")
    return {entry.mcore: entry.join(*(hf_state[name] for name in entry.hf)).contiguous() for entry in _entries(config)}


def hf_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns the published name and shape of every parameter."""
    hidden, ffn, patch = config.hidden_size, config.ffn_hidden_size, config.patch_size
    square = {"weight": (hidden, hidden), "bias": (hidden,)}
    norm = {"weight": (hidden,), "bias": (hidden,)}
    mlp = {"fc1.weight": (ffn, hidden), "fc1.bias": (ffn,), "fc2.weight": (hidden, ffn), "fc2.bias": (hidden,)}
    layer = {f"self_attn.{name}_proj.{kind}": shape for name in "kvq" for kind, shape in square.items()}
    layer |= {f"self_attn.out_proj.{kind}": shape for kind, shape in square.items()}
    layer |= {f"layer_norm{number}.{kind}": shape for number in (1, 2) for kind, shape in norm.items()}
    layer |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    shapes: dict[str, tuple[int, ...]] = {"embeddings.patch_embedding.weight": (hidden, 3, patch, patch)}
    shapes |= {f"layernorm_pre.{kind}": shape for kind, shape in norm.items()}
    for index in range(config.num_layers):
        shapes |= {f"encoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    if config.has_final_norm:
        shapes |= {f"layernorm_post.{kind}": shape for kind, shape in norm.items()}
    if config.use_head:
        shapes |= {"head.probe": (1, 1, hidden), "head.norm.weight": (hidden,)}
        shapes |= {"head.attention.in_proj_weight": (3 * hidden, hidden), "head.attention.in_proj_bias": (3 * hidden,)}
        shapes |= {f"head.attention.out_proj.{kind}": shape for kind, shape in square.items()}
        shapes |= {f"head.mlp.{name}": shape for name, shape in mlp.items()}
    return shapes


def mcore_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and full shape of every parameter of a one-process `VisionEncoder` with local layers."""
    published = hf_shapes(config)
    # Joining tensors of the meta device gives the shapes, and nothing else.
    return {
        entry.mcore: tuple(entry.join(*(torch.empty(published[name], device="meta") for name in entry.hf)).shape)
        for entry in _entries(config)
    }


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    """Checks that `state` has exactly these names and shapes.

    Args:
        state: names to tensors.
        shapes: expected names to shapes.
        what: how the message calls the state.

    Raises:
        CheckpointError: one sentence with every kind of difference.
    """
    differences = []
    if missing := [name for name in shapes if name not in state]:
        differences.append(f"misses {_listed(missing)}")
    if unexpected := [name for name in state if name not in shapes]:
        differences.append(f"has unknown {_listed(unexpected)}")
    wrong = [
        f"{name} of shape {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    if wrong:
        differences.append(f"has {_listed(wrong)}")
    if differences:
        raise CheckpointError(
            f"{what} does not fit this encoder configuration: it {', and '.join(differences)}; "
            "use the configuration it was made with (hidden size, layers, heads, patch size, use_head)"
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    text = ", ".join(names[:_MAX_NAMED_KEYS])
    return text if len(names) <= _MAX_NAMED_KEYS else f"{text} and {len(names) - _MAX_NAMED_KEYS} more"


def _entries(config: EncoderConfig) -> list[_Entry]:
    patch = config.patch_size
    entries = [
        _Entry(
            "patch_embed.weight",
            ("embeddings.patch_embedding.weight",),
            split=lambda weight: (weight.unflatten(1, (3, patch, patch)),),
            join=lambda weight: weight.flatten(1),
        ),
        *_renamed("layernorm_pre", "layernorm_pre"),
    ]
    for index in range(config.num_layers):
        entries += _layer_entries(f"decoder.layers.{index}", f"encoder.layers.{index}", config)
    if config.has_final_norm:
        entries += _renamed("decoder.final_layernorm", "layernorm_post")
    if config.use_head:
        entries += [_same(f"head.{name}", f"head.{name}") for name in _HEAD_NAMES]
    return entries


def _layer_entries(mcore: str, hf: str, config: EncoderConfig) -> list[_Entry]:
    heads, head_dim = config.num_attention_heads, config.head_dim

    def split(fused: Tensor) -> tuple[Tensor, ...]:
        """[n * 3 * d, ...] with q, k, v of head 0, then of head 1, ... -> three [n * d, ...]."""
        return tuple(part.flatten(0, 1) for part in fused.unflatten(0, (heads, 3, head_dim)).unbind(1))

    def join(*parts: Tensor) -> Tensor:
        return torch.stack([part.unflatten(0, (heads, head_dim)) for part in parts], dim=1).flatten(0, 2)

    entries = [
        _Entry(
            f"{mcore}.self_attention.linear_qkv.{kind}",
            tuple(f"{hf}.self_attn.{name}_proj.{kind}" for name in "qkv"),
            split=split,
            join=join,
        )
        for kind in ("weight", "bias")
    ]
    for ours, theirs in _LAYER_NAMES.items():
        entries += _renamed(f"{mcore}.{ours}", f"{hf}.{theirs}")
    return entries


def _renamed(mcore: str, hf: str) -> list[_Entry]:
    return [_same(f"{mcore}.{kind}", f"{hf}.{kind}") for kind in ("weight", "bias")]


def _same(mcore: str, hf: str) -> _Entry:
    return _Entry(mcore, (hf,), split=lambda tensor: (tensor,), join=lambda tensor: tensor)
