"""Loads a HuggingFace folder of this architecture with the class of this package.

No code of the folder runs, whatever its config.json names, and nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_ove.hf_model.configuration_onevision_encoder import OneVisionEncoderConfig
from megatron_ove.hf_model.configuration_onevision_reader import OneVisionReaderConfig
from megatron_ove.hf_model.modeling_onevision_encoder import OneVisionEncoderModel
from megatron_ove.hf_model.modeling_onevision_reader import OneVisionReaderModel

MODEL_TYPE = OneVisionEncoderConfig.model_type
READER_TYPE = OneVisionReaderConfig.model_type


def read_config(folder: str | Path) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises:
        OSError: it cannot be read.
        ValueError: with the reason; it is no JSON object.
    """
    try:
        values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its config.json is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("its config.json holds no JSON object")
    return values


def load_onevision_model(folder: str | Path) -> OneVisionEncoderModel:
    """Loads a OneVision-Encoder in fp32 on the CPU, ready for evaluation.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: with the reason; a model of another type, or damaged or missing weights.
    """
    return _load(folder, OneVisionEncoderModel)


def load_reader_model(folder: str | Path) -> OneVisionReaderModel:
    """Loads a reader (encoder, bridge, text decoder) in fp32 on the CPU, ready for evaluation.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: with the reason; a model of another type, or damaged or missing weights.
    """
    return _load(folder, OneVisionReaderModel)


def _load(folder: str | Path, model_class: Any) -> Any:
    from safetensors import SafetensorError

    kind, wanted = read_config(folder).get("model_type"), model_class.config_class.model_type
    if kind != wanted:
        raise ValueError(f"its config.json has model_type = {kind!r} instead of {wanted!r}")
    try:
        loaded: Any = model_class.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
        raise ValueError(f"{len(missing)} of its weights are missing, e.g. {missing[0]}")
    return model.eval()
