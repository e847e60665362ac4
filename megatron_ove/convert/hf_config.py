"""Between `EncoderConfig` and the published config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.errors import CheckpointError

MODEL_TYPE = "onevision_encoder"
ARCHITECTURE = "OneVisionEncoderModel"
# Side of the pictures when nothing else is known; the published default.
DEFAULT_IMAGE_SIZE = 448

_RENAMED = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "patch_size": "patch_size",
    "layer_norm_eps": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "rope_theta": "rope_theta",
    "rope_temporal_size": "rope_temporal_size",
    "use_head": "use_head",
}
# Published defaults of those fields, which a config.json may leave out.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "rope_temporal_size": 64,
    "use_head": True,
}
# Options of the published model that this trainer's encoder has one value of.
_FIXED: dict[str, Any] = {
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_type": "layer_norm",
    "attention_dropout": 0.0,
}


def to_hf_config(config: EncoderConfig, *, image_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the content of config.json.

    Args:
        config: the encoder.
        image_size: side of the pictures trained on; for information.
        dtype: of the stored weights.
    """
    # The published model has both norm and head or neither; one of them alone is an option of the code we ship.
    more = {} if config.has_final_norm == config.use_head else {"final_norm": config.has_final_norm}
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_onevision_encoder.OneVisionEncoderConfig",
            "AutoModel": f"modeling_onevision_encoder.{ARCHITECTURE}",
        },
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config, ours) for theirs, ours in _RENAMED.items()},
        **_FIXED,
        **more,
        "image_size": image_size,
        "dtype": str(dtype).removeprefix("torch."),
    }


def from_hf_config(values: Mapping[str, Any], *, origin: str) -> EncoderConfig:
    """Returns the encoder that a config.json describes.

    Args:
        values: content of config.json; keys left out have their published defaults.
        origin: what messages call it.

    Raises:
        CheckpointError: another architecture, or an option that this trainer's encoder does not have.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{origin} describes a model of type {values.get('model_type')!r}, but only {MODEL_TYPE!r} can be imported "
            "into this encoder; name a folder of that architecture"
        )
    for key, expected in _FIXED.items():
        if values.get(key, expected) != expected:
            raise CheckpointError(
                f"{origin} has {key} = {values[key]!r}, but this encoder has {expected!r} only, so its outputs would "
                "differ; this model cannot be imported"
            )
    try:
        return EncoderConfig(
            **{ours: values.get(theirs, _DEFAULTS[theirs]) for theirs, ours in _RENAMED.items()},
            final_norm=values.get("final_norm"),
        )
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'sizes'}: {item['msg']}" for item in error.errors()
        )
        raise CheckpointError(
            f"{origin} describes an encoder that cannot be built ({problems}); correct the file"
        ) from error
