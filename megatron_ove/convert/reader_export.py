"""From a checkpoint to a HuggingFace folder that reads: encoder, bridge and text decoder together."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ove.config.text_generation import TextGenerationConfig
from megatron_ove.convert.checkpoint_files import encoder_state_from_checkpoint, read_checkpoint_facts, read_tensors
from megatron_ove.convert.decoder_config import decoder_to_hf
from megatron_ove.convert.decoder_weights import decoder_to_published
from megatron_ove.convert.hf_config import to_hf_config
from megatron_ove.convert.hf_export import trained_image_size
from megatron_ove.convert.hf_folder import READER_CODE, write_hf_folder
from megatron_ove.convert.mapping import to_hf
from megatron_ove.convert.model_card import describe_reader
from megatron_ove.errors import CheckpointError, ConfigError
from megatron_ove.kinds import kinds_of
from megatron_ove.model.parameter_names import canonical_name
from megatron_ove.model.pooling import heads_of_width

logger = logging.getLogger(__name__)

_STACK = "decoder.transformer.layers."


def export_reader(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    *,
    objective: str,
    view: str,
    template: Mapping[str, list[int]],
    end_token: int,
    tokenizer: bytes,
    averaged: bool = False,
) -> Path:
    """Writes a reader of a checkpoint; no other process or GPU is needed.

    Args:
        checkpoint_dir: a checkpoint folder.
        output_dir: new folder.
        objective: of kind text_generation.
        view: what of it the reader asks for: text, turns or captions.
        template: token ids around image tokens and texts, see `OneVisionReaderConfig`.
        end_token: id of what ends an answer.
        tokenizer: content of tokenizer.json.
        averaged: whether the moving average of the weights is written instead of the weights.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint is not whole, holds no such objective, or the folder cannot be written.
    """
    state, encoder = encoder_state_from_checkpoint(checkpoint_dir, averaged=averaged)
    facts = read_checkpoint_facts(checkpoint_dir, verify=False)  # compared a moment ago
    section = text_generation_section(facts, objective, checkpoint_dir)
    bridge, decoder = _modules_of(checkpoint_dir, objective, section, averaged=averaged)
    published = {f"vision.{name}": tensor for name, tensor in to_hf(state, encoder).items()}
    published |= {f"bridge.{name}": tensor for name, tensor in bridge.items()}
    language = decoder_to_published(decoder, section.decoder)
    if section.decoder.tied:  # each part of a folder is found by its name, so that no loader has to know of the tie
        language["lm_head.weight"] = language[_token_table(section)].clone()
    published |= {f"language_model.{name}": tensor for name, tensor in language.items()}
    dtype = next(iter(published.values())).dtype
    image_size = trained_image_size(facts)
    values = {
        "architectures": ["OneVisionReaderModel"],
        "auto_map": {
            "AutoConfig": "configuration_onevision_reader.OneVisionReaderConfig",
            "AutoModel": "modeling_onevision_reader.OneVisionReaderModel",
        },
        "model_type": "onevision_reader",
        "vision_config": _without_auto_map(to_hf_config(encoder, image_size=image_size, dtype=dtype)),
        "text_config": decoder_to_hf(section.decoder, dtype=str(dtype).removeprefix("torch."), end_token_id=end_token),
        "bridge": {
            "kind": section.bridge.kind,
            "num_queries": section.bridge.num_queries,
            "num_heads": heads_of_width(encoder.hidden_size),
        },
        "template": dict(template),
        "end_token_id": end_token,
        "normalisation": section.normalisation,
        "trained_on": {
            "texts": view,
            "max_patches": _most_patches(facts, section),
            "max_text_tokens": section.max_text_tokens,
        },
        "image_size": image_size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    counted = [tensor.numel() for name, tensor in published.items() if not (section.decoder.tied and "lm_head" in name)]
    card = describe_reader(facts, objective, num_parameters=sum(counted))
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _json(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": section.template.end_token}
        ),
    }
    path = write_hf_folder(output_dir, published, values, model_card=card, files=files, code=READER_CODE)
    logger.info("exported %d tensors to %s", len(published), path)
    return path


def text_generation_section(
    facts: Mapping[str, Any], objective: str, checkpoint_dir: str | Path
) -> TextGenerationConfig:
    """Returns the stored section of an objective that writes.

    Raises:
        CheckpointError: there is none of this name and kind.
    """
    stored = facts["config"].get("objectives", {})
    writing = [name for name, one in stored.items() if one.get("kind") == "text_generation"]
    if objective not in writing:
        raise CheckpointError(
            f"the checkpoint {checkpoint_dir} has no objective '{objective}' of kind text_generation (it has "
            f"{', '.join(writing) or 'none'}); name one of them"
        )
    try:
        section_class = kinds_of(facts["config"]).objectives["text_generation"].config
        section = section_class.model_validate_json(json.dumps(stored[objective]))  # lists of plain values are tuples
    except (ConfigError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint_dir} has a section objectives.{objective} that this version does not "
            f"understand ({str(error).splitlines()[0]}); export it with the version that wrote it"
        ) from error
    assert isinstance(section, TextGenerationConfig)
    return section


def _modules_of(
    checkpoint_dir: str | Path, objective: str, section: TextGenerationConfig, *, averaged: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns whole tensors of bridge and decoder, by names of one process."""
    prefix = f"{'average.' if averaged else ''}modules.{objective}."
    stored = {key.removeprefix(prefix): tensor for key, tensor in read_tensors(checkpoint_dir, prefix).items()}
    if not stored:
        what = "averaged weights of" if averaged else "weights of"
        raise CheckpointError(
            f"the checkpoint {checkpoint_dir} holds no {what} objectives.{objective}; use another one"
        )
    found: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        if key.startswith(_STACK):  # layers lie in one stack
            for index, layer in enumerate(tensor):
                found[canonical_name(f"{_STACK}{index}.{key.removeprefix(_STACK)}")] = layer
        else:
            found[key] = tensor
    parts = [
        {name.removeprefix(part): tensor for name, tensor in found.items() if name.startswith(part)}
        for part in ("bridge.", "decoder.")
    ]
    return parts[0], parts[1]


def _most_patches(facts: Mapping[str, Any], section: TextGenerationConfig) -> int | None:
    """Returns the most patches of a page that any source of the objective showed; None = its sources say none."""
    sources = facts["config"].get("data", {}).get("sources", {})
    given = [sources[name].get("max_patches") for name in section.sources if name in sources]
    numbers = [number for one in given for number in (one if isinstance(one, list | tuple) else [one]) if number]
    return max(numbers, default=None)


def _token_table(section: TextGenerationConfig) -> str:
    return f"model.{'decoder.' if section.decoder.kind == 'opt' else ''}embed_tokens.weight"


def _without_auto_map(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("auto_map", "architectures")}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
