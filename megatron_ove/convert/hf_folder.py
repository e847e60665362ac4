"""HuggingFace folders as files: safetensors, config.json, modelling code, image processor, model card."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ove import hf_model
from megatron_ove.errors import CheckpointError
from megatron_ove.model.patch_embed import CLIP_MEAN, CLIP_STD
from megatron_ove.new_folder import new_folder

ENCODER_CODE = ("configuration_onevision_encoder.py", "modeling_onevision_encoder.py")
READER_CODE = (*ENCODER_CODE, "configuration_onevision_reader.py", "modeling_onevision_reader.py")
_CODE_DIR = Path(hf_model.__file__).parent
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_BICUBIC = 3  # PIL's number


def write_hf_folder(
    output_dir: str | Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    model_card: str,
    files: Mapping[str, bytes] | None = None,
    code: Sequence[str] = ENCODER_CODE,
) -> Path:
    """Writes a complete HuggingFace folder; it appears only when every file is in it.

    Args:
        output_dir: new folder; files in it have the rights that the umask gives.
        state: published names to contiguous tensors.
        config: content of config.json.
        model_card: content of README.md.
        files: further files, relative path -> content.
        code: files of `hf_model` that the folder's models are made of.

    Raises:
        CheckpointError: the folder exists or cannot be written.
    """
    with new_folder(output_dir, error=CheckpointError) as partial:
        _write_json(partial / "config.json", config)
        try:
            save_file(dict(state), partial / _WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(
                f"{output_dir}/{_WEIGHTS} cannot be written ({error}); check the free space"
            ) from error
        # safetensors makes files for their owner alone; the umask's rights are those of its neighbour.
        rights = stat.S_IMODE((partial / "config.json").stat().st_mode)
        if stat.S_IMODE((partial / _WEIGHTS).stat().st_mode) != rights:
            (partial / _WEIGHTS).chmod(rights)
        _write_json(partial / "preprocessor_config.json", image_processor_config(config["image_size"]))
        for name in code:
            shutil.copyfile(_CODE_DIR / name, partial / name)
        (partial / "README.md").write_text(model_card, encoding="utf-8")
        for name, content in (files or {}).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
    return Path(output_dir)


def read_hf_folder(hf_dir: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights and the content of config.json of a HuggingFace folder.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = Path(hf_dir)
    config = _read_json(path / "config.json", path)
    names = [_WEIGHTS]
    if (path / _WEIGHTS_INDEX).exists():
        names = sorted(set(_read_json(path / _WEIGHTS_INDEX, path).get("weight_map", {}).values()))
    state: dict[str, Tensor] = {}
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(
                f"{path} holds no {name}, so its weights cannot be read; save the model there with "
                "save_pretrained(..., safe_serialization=True)"
            )
        try:
            state |= load_file(path / name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path / name} is damaged ({error}); get the file again") from error
    return state, config


def image_processor_config(image_size: int) -> dict[str, Any]:
    """Returns preprocessor_config.json: shorter side to `image_size`, centre crop, CLIP mean and deviation."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no {path.name}, so it is not a HuggingFace model; name a folder made by save_pretrained"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); get the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object; get the file again")
    return values
