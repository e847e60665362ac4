"""Between `TextDecoderConfig` and the config.json of published OPT, Qwen2 and Llama decoders. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ove.config.text_generation import TextDecoderConfig
from megatron_ove.errors import CheckpointError

_ARCHITECTURES = {"opt": "OPTForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
_MLP_WIDTH = {"opt": "ffn_dim", "qwen2": "intermediate_size", "llama": "intermediate_size"}
_SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
_OPT_EPSILON = 1e-5
"""OPT's LayerNorms are torch's default; its config.json says nothing of it."""
# What this decoder has one value of. A value of None may also be missing.
_FIXED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "opt": {
        "do_layer_norm_before": (True,),
        "activation_function": ("relu",),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
    },
    "qwen2": {
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "rope_scaling": (None,),
        "partial_rotary_factor": (1.0,),
    },
    "llama": {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "partial_rotary_factor": (1.0,),
        "pretraining_tp": (1,),
    },
}
_PUBLISHED_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "opt": {"max_position_embeddings": 2048, "tie_word_embeddings": True},
    "qwen2": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
}


def read_decoder_config(folder: str | Path) -> TextDecoderConfig:
    """Returns the decoder that a HuggingFace folder holds.

    Raises:
        CheckpointError: there is no readable config.json, or it describes what this decoder does not compute.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); name the folder of a decoder, which holds config.json and *.safetensors"
        ) from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} holds no JSON object, so it describes no decoder; name another folder")
    return decoder_from_hf(values, origin=str(path), folder=str(folder))


def decoder_from_hf(values: Mapping[str, Any], *, origin: str, folder: str | None = None) -> TextDecoderConfig:
    """Returns the decoder that the content of a config.json describes.

    Args:
        values: its content; keys left out have their published defaults.
        origin: what messages call it.
        folder: where the weights are.

    Raises:
        CheckpointError: another architecture, or an option that this decoder does not have.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise CheckpointError(
            f"{origin} describes a model of type {kind!r}, and decoders of type {', '.join(_ARCHITECTURES)} can be "
            "read; name a folder of one of these"
        )
    values = {**_PUBLISHED_DEFAULTS[kind], **{key: value for key, value in values.items() if value is not None}}
    values |= _rotary_of(values)
    for key, allowed in _FIXED[kind].items():
        if values.get(key, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{origin} has {key} = {values[key]!r}, and this decoder computes {allowed[0]!r} only, so what it says "
                "would differ; use another decoder"
            )
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if kind == "opt" and values.get("word_embed_proj_dim", hidden) != hidden:
        raise CheckpointError(
            f"{origin} has word_embed_proj_dim = {values['word_embed_proj_dim']} beside hidden_size = {hidden}, and "
            "this decoder has one width (as every OPT but that of 350M); use another decoder"
        )
    if (
        kind != "opt"
        and isinstance(hidden, int)
        and heads
        and values.get("head_dim", hidden // heads) != hidden // heads
    ):
        raise CheckpointError(
            f"{origin} has head_dim = {values['head_dim']}, and this decoder's is hidden_size / num_attention_heads = "
            f"{hidden // heads}; use another decoder"
        )
    try:
        return TextDecoderConfig(
            path=folder,
            kind=kind,  # type: ignore[arg-type]  # looked up above
            **{ours: values[theirs] for ours, theirs in _SIZES.items()},
            ffn_hidden_size=values[_MLP_WIDTH[kind]],
            num_key_value_heads=None if kind == "opt" else values.get("num_key_value_heads", heads),
            norm_epsilon=_OPT_EPSILON if kind == "opt" else float(values["rms_norm_eps"]),
            rope_theta=float(values.get("rope_theta", 10000.0)),
            tied=bool(values.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise CheckpointError(
            f"{origin} lacks {error.args[0]}, so no decoder can be built; correct the file"
        ) from error
    except (ValueError, TypeError) as error:
        reason = "; ".join(str(error).splitlines()[1:2]).strip() or str(error)
        raise CheckpointError(
            f"{origin} describes a decoder that cannot be built ({reason}); correct the file"
        ) from error


def _rotary_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rope_theta and rope_scaling as transformers 4 writes them; 5 writes both as rope_parameters."""
    rope = values.get("rope_parameters")
    found: dict[str, Any] = {"rope_scaling": values.get("rope_scaling")}
    if isinstance(rope, Mapping):
        is_plain = rope.get("rope_type", "default") == "default" and set(rope) <= {"rope_type", "rope_theta"}
        found = {"rope_scaling": None if is_plain else dict(rope)}
        if "rope_theta" in rope:
            found["rope_theta"] = rope["rope_theta"]
    scaling = found["rope_scaling"]
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) == "default":
        found["rope_scaling"] = None
    return found


def decoder_to_hf(section: TextDecoderConfig, *, dtype: str, end_token_id: int) -> dict[str, Any]:
    """Returns the content of config.json.

    Args:
        section: all sizes known.
        dtype: of the stored weights, e.g. "float32".
        end_token_id: ends an answer.
    """
    assert section.kind is not None and section.is_known
    common = {
        "architectures": [_ARCHITECTURES[section.kind]],
        "model_type": section.kind,
        **{theirs: getattr(section, ours) for ours, theirs in _SIZES.items()},
        _MLP_WIDTH[section.kind]: section.ffn_hidden_size,
        "tie_word_embeddings": section.tied,
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": end_token_id,
        "pad_token_id": end_token_id,
        **{key: allowed[0] for key, allowed in _FIXED[section.kind].items()},
    }
    if section.kind == "opt":
        return {**common, "word_embed_proj_dim": section.hidden_size, "dropout": 0.0, "attention_dropout": 0.0}
    return {
        **common,
        "num_key_value_heads": section.key_value_heads,
        "rms_norm_eps": section.norm_epsilon,
        "rope_theta": section.rope_theta,
        "attention_dropout": 0.0,
    }
