"""The two-way table between a `TextDecoder`'s parameters and published OPT, Qwen2 and Llama weights.

Both sides are whole tensors. Every conversion moves values only, so a round trip is bit-exact, and it is linear, so it
maps gradients as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ove.config.text_generation import OPT_POSITION_OFFSET, TextDecoderConfig
from megatron_ove.errors import CheckpointError

_Rule = Literal["same", "vocabulary", "heads", "gated"]
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class _Entry:
    """One of our parameters, the published ones it is made of, and how."""

    ours: str
    theirs: tuple[str, ...]
    rule: _Rule = "same"


def decoder_from_published(state: Mapping[str, Tensor], section: TextDecoderConfig) -> dict[str, Tensor]:
    """Returns our whole tensors, by names of a one-process `TextDecoder`."""
    return {entry.ours: _join(entry, [state[name] for name in entry.theirs], section) for entry in _entries(section)}


def decoder_to_published(state: Mapping[str, Tensor], section: TextDecoderConfig) -> dict[str, Tensor]:
    """Returns published names to whole tensors; of a tied decoder without lm_head, as its file has them."""
    found: dict[str, Tensor] = {}
    for entry in _entries(section):
        parts = _split(entry, state[entry.ours], section)
        found |= zip(entry.theirs, (part.contiguous() for part in parts), strict=True)
    return found


class PublishedDecoder:
    """The weights of a HuggingFace folder, read one of ours at a time."""

    def __init__(self, folder: str | Path, section: TextDecoderConfig) -> None:
        """Looks at the names.

        Args:
            folder: that holds model.safetensors, or several files and their index.
            section: the decoder that config.json describes.

        Raises:
            CheckpointError: there are no such weights, or they are not those of the configuration.
        """
        self._folder, self._section = Path(folder), section
        self._entries = {entry.ours: entry for entry in _entries(section)}
        self._shapes = published_shapes(section)
        self._file_of = self._list_files()
        # A file may lack the prefix of the language model, as files of the bare model do.
        root = _root(section)
        stems = [root] if any(name.startswith(root) for name in self._file_of) else [root, root.partition(".")[2], ""]
        for removed in stems[1:]:
            if any(name.startswith(f"{removed}embed_tokens") for name in self._file_of):
                kept = ("lm_head.weight",)  # stands beside the model, whatever the model is called
                renamed = {
                    name if name in kept else f"{root}{name.removeprefix(removed)}": name for name in self._file_of
                }
                break
        else:
            renamed = {name: name for name in self._file_of}
        self._stored = renamed
        missing = [name for entry in self._entries.values() for name in entry.theirs if name not in self._stored]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of the decoder's weights, e.g. {missing[0]}, so it is another model or "
                "incomplete; fetch the folder again"
            )

    def whole(self, name: str) -> Tensor:
        """Returns one of our parameters, whole, in the stored dtype.

        Raises:
            CheckpointError: it cannot be read, or has another shape.
        """
        entry = self._entries[name]
        try:
            parts = [self._read(one) for one in entry.theirs]
            is_whole = entry.rule != "vocabulary" or len(parts[0]) == self._section.vocab_size
            joined = _join(entry, parts, self._section) if is_whole else parts[0]
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{self._folder} has {entry.theirs[0]} in a form that cannot be read ({error}); fetch it again"
            ) from error
        shape = self._shapes[name]
        if tuple(joined.shape) != shape or not is_whole:
            raise CheckpointError(
                f"{self._folder} has {entry.theirs[0]} of another shape than its config.json says "
                f"({list(joined.shape)}, not {list(shape)}); fetch it again"
            )
        return joined

    def _read(self, name: str) -> Tensor:
        stored = self._stored[name]
        with safe_open(self._folder / self._file_of[stored], framework="pt") as file:
            return file.get_tensor(stored)

    def _list_files(self) -> dict[str, str]:
        """Returns stored name -> file."""
        try:
            if (self._folder / _INDEX).is_file():
                files = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
                if any(Path(file).name != file for file in files.values()):
                    raise ValueError("its index names files of other folders")
                return dict(files)
            with safe_open(self._folder / _SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._folder} holds no readable {_SINGLE} ({error}); name the folder of a decoder with safetensors"
            ) from error


def published_shapes(section: TextDecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns our parameters' whole shapes, by name."""
    hidden, ffn, vocab = section.hidden_size or 0, section.ffn_hidden_size or 0, section.padded_vocab
    joint = (section.num_attention_heads or 0) + 2 * section.key_value_heads
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in _entries(section):
        _, _, kind = entry.ours.rpartition(".")
        if "linear_qkv" in entry.ours:
            shape = (joint * section.head_dim, hidden)
        elif "linear_fc1" in entry.ours:
            shape = (ffn * (2 if entry.rule == "gated" else 1), hidden)
        elif "linear_fc2" in entry.ours:
            shape = (hidden, ffn)
        elif "linear_proj" in entry.ours:
            shape = (hidden, hidden)
        elif entry.rule == "vocabulary":
            shape = (vocab, hidden)
        elif entry.ours.startswith("position"):
            shape = (section.max_positions + OPT_POSITION_OFFSET, hidden)
        else:
            shape = (hidden,)
        shapes[entry.ours] = shape[:1] if kind == "bias" else shape
    return shapes


def _root(section: TextDecoderConfig) -> str:
    return "model.decoder." if section.kind == "opt" else "model."


def _entries(section: TextDecoderConfig) -> Iterator[_Entry]:
    root, is_opt = _root(section), section.kind == "opt"
    kinds = ("weight", "bias") if is_opt else ("weight",)
    yield _Entry("word_embeddings.weight", (f"{root}embed_tokens.weight",), "vocabulary")
    if is_opt:
        yield _Entry("position_embeddings.weight", (f"{root}embed_positions.weight",))
    for index in range(section.num_layers or 0):
        yield from _layer_entries(f"transformer.layers.{index}.", f"{root}layers.{index}.", section)
    final = f"{root}final_layer_norm" if is_opt else f"{root}norm"
    yield from (_Entry(f"transformer.final_layernorm.{kind}", (f"{final}.{kind}",)) for kind in kinds)
    if not section.tied:
        yield _Entry("output_table.weight", ("lm_head.weight",), "vocabulary")


def _layer_entries(ours: str, theirs: str, section: TextDecoderConfig) -> Iterator[_Entry]:
    is_opt = section.kind == "opt"
    kinds = ("weight", "bias") if is_opt else ("weight",)
    names = {
        "input_layernorm": "self_attn_layer_norm" if is_opt else "input_layernorm",
        "self_attention.linear_proj": "self_attn.out_proj" if is_opt else "self_attn.o_proj",
        "pre_mlp_layernorm": "final_layer_norm" if is_opt else "post_attention_layernorm",
        "mlp.linear_fc2": "fc2" if is_opt else "mlp.down_proj",
    }
    for kind in kinds if section.kind != "qwen2" else ("weight", "bias"):
        joint = tuple(f"{theirs}self_attn.{one}_proj.{kind}" for one in "qkv")
        yield _Entry(f"{ours}self_attention.linear_qkv.{kind}", joint, "heads")
    for own, published in names.items():
        yield from (_Entry(f"{ours}{own}.{kind}", (f"{theirs}{published}.{kind}",)) for kind in kinds)
    if is_opt:
        yield from (_Entry(f"{ours}mlp.linear_fc1.{kind}", (f"{theirs}fc1.{kind}",)) for kind in kinds)
    else:
        gated = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
        yield _Entry(f"{ours}mlp.linear_fc1.weight", gated, "gated")


def _join(entry: _Entry, parts: list[Tensor], section: TextDecoderConfig) -> Tensor:
    if entry.rule == "heads":  # of each head of keys: its queries, its key, its value
        groups = section.key_value_heads
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
    if entry.rule == "vocabulary":
        (table,) = parts
        rows = section.padded_vocab - len(table)
        return torch.cat([table, table.new_zeros(rows, *table.shape[1:])]) if rows else table
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _split(entry: _Entry, tensor: Tensor, section: TextDecoderConfig) -> list[Tensor]:
    if entry.rule == "heads":
        groups, width = section.key_value_heads, section.head_dim
        sizes = [(section.num_attention_heads or 0) // groups * width, width, width]
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (groups, -1)).split(sizes, dim=1)]
    if entry.rule == "vocabulary":
        return [tensor[: section.vocab_size]]
    return list(tensor.chunk(len(entry.theirs)))
