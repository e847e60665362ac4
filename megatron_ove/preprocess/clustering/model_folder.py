"""A vision model from a local HuggingFace folder as a describer of pictures.

Nothing is downloaded, and code of the folder runs only when that is asked for; folders of this package's own encoder
need none. What cannot work (a text model, damaged or missing weights, no image processor, vectors that are not finite
or the same for every picture) is one sentence when the model is loaded, before the first file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ove.errors import DataError

logger = logging.getLogger(__name__)

# A longer strip would be scaled to many thousand pixels by processors that scale the shorter side.
_MAX_ASPECT = 64
_PROBE_SIDE = 64
# Vectors have length 1 and fp32 values; those of two pictures with nothing in common differ by more.
_SAME_VECTOR = 1e-6
# What differs between copies of a model that describe alike.
_VOLATILE_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class FolderModelDescriber:
    """Describes by image features if the model has them, else by its pooled output, else by the mean of its tokens."""

    def __init__(self, folder: str | Path, *, device: str = "cpu", trust_remote_code: bool = False) -> None:
        """Loads model and image processor in fp32 and tries them on two made-up pictures.

        Args:
            folder: local folder with config.json, weights and preprocessor_config.json.
            device: where the model runs.
            trust_remote_code: whether Python code of the folder may run.

        Raises:
            DataError: the folder does not hold a model that can describe pictures.
        """
        from transformers import AutoImageProcessor

        from megatron_ove.hf_model.folder import MODEL_TYPE

        self._folder, self._device = Path(folder), device
        self._name: str | None = None
        self._config = _read_config(self._folder)
        self._model, missing = _load_model(self._folder, self._config, trust_remote_code)
        self._has_pooler = not missing
        self._model.to(device)
        self._call = _picture_function(self._model, self._folder, self._config)
        self._inputs = {"pixel_values", *inspect.signature(self._call).parameters}
        self._runs_code = trust_remote_code and self._config.get("model_type") != MODEL_TYPE
        _require_processor(self._folder, self._config)
        with _explained(self._folder, "its image processor cannot be loaded"):
            self._processor = AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
        # Without it a picture of 1 or 3 rows is taken for one with its channels first.
        self._options = {"input_data_format": "channels_last"} if _takes_format(self._processor) else {}
        self._probe()

    @property
    def name(self) -> str:
        """Kind of the model and a digest of its weights and settings: equal for copies, whatever the folder is called.

        The weights are read once more for it, so it is asked for in one process only. Raises `DataError` when a file of
        settings that loading did not look into is damaged.
        """
        if self._name is None:
            digest = _digest(self._folder, with_code=self._runs_code)
            self._name = f"model:{self._config.get('model_type', 'unknown')}:{digest}"
        return self._name

    def describe(self, picture: np.ndarray) -> np.ndarray:
        """See `Describer.describe`; d is the model's feature size.

        Of a picture more than 64 times as long as wide, the middle is described.

        Raises:
            DataError: the model gives values that are not finite.
        """
        vector = self._features(picture)
        if not np.isfinite(vector).all():
            raise DataError(
                f"the model in {self._folder} gives values that are not finite for this picture of {picture.shape[1]} "
                f"x {picture.shape[0]} pixels; leave the picture out, or use another model"
            )
        return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)

    def _features(self, picture: np.ndarray) -> np.ndarray:
        import torch

        processed = self._processor(images=_cut_to_aspect(picture), return_tensors="pt", **self._options)
        inputs = {
            name: value.to(self._device)
            for name, value in processed.items()
            if name in self._inputs and isinstance(value, torch.Tensor)
        }
        with torch.inference_mode():
            return _one_vector(self._call(**inputs), has_pooler=self._has_pooler).float().cpu().numpy()

    def _probe(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (_PROBE_SIDE, _PROBE_SIDE, 3), dtype=np.uint8)
        ramp = np.linspace(0, 255, _PROBE_SIDE, dtype=np.uint8)[:, None, None].repeat(_PROBE_SIDE, 1).repeat(3, 2)
        with _explained(self._folder, "it cannot describe a picture"):
            vectors = [self._features(picture) for picture in (noise, ramp)]
        if not all(np.isfinite(vector).all() for vector in vectors):
            raise DataError(
                f"the model in {self._folder} gives values that are not finite, so its weights are damaged; get the "
                "model again"
            )
        lengths = [float(np.linalg.norm(vector)) for vector in vectors]
        if not all(lengths) or np.abs(vectors[0] / lengths[0] - vectors[1] / lengths[1]).max() < _SAME_VECTOR:
            raise DataError(
                f"the model in {self._folder} gives the same values for pictures that have nothing in common, so it "
                "cannot tell pictures apart (untrained or damaged weights?); use another model"
            )


@contextmanager
def _explained(folder: Path, what: str) -> Iterator[None]:
    """Turns whatever a foreign model raises into a sentence (it may be of any class), and keeps its log quiet."""
    from transformers.utils import logging as their_logging

    verbosity = their_logging.get_verbosity()
    their_logging.set_verbosity_error()
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        logger.debug("%s: %s", folder, what, exc_info=True)
        if "trust_remote_code" in str(error):
            raise DataError(
                f"the model in {folder} needs Python code that lies in its folder, and such code can do anything on "
                "this machine; read it and then give --trust-remote-code, or use another model"
            ) from error
        reason = next(iter(str(error).strip().splitlines()), "no reason given")[:300]
        raise DataError(
            f"the model folder {folder} cannot be used: {what} ({type(error).__name__}: {reason}); give a vision model "
            "with all the files that save_pretrained or its publisher put there"
        ) from error
    finally:
        their_logging.set_verbosity(verbosity)


def _read_config(folder: Path) -> dict[str, Any]:
    from megatron_ove.hf_model.folder import read_config

    if not (folder / "config.json").is_file():
        raise DataError(
            f"the model folder {folder} has no config.json, so it is no HuggingFace model; give the folder that "
            "save_pretrained or a download wrote"
        )
    with _explained(folder, "it cannot be read"):
        return read_config(folder)


def _load_model(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> tuple[Any, list[str]]:
    """Returns the model in fp32 and evaluation mode, and the names of a pooler's weights that are not in the folder."""
    import torch
    from transformers import AutoModel

    from megatron_ove.hf_model.folder import MODEL_TYPE, load_onevision_model

    if config.get("model_type") == MODEL_TYPE:
        with _explained(folder, "it is damaged"):
            return load_onevision_model(folder), []
    with _explained(folder, "it cannot be loaded"):
        model, report = AutoModel.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    # Classifiers are often published without the pooler that a plain model has; without it the tokens are there.
    if others := [name for name in missing if "pooler." not in name]:
        raise DataError(
            f"the model folder {folder} lacks {len(others)} of its model's weights, e.g. {others[0]}, which would be "
            "random; get the whole model"
        )
    return model.eval(), missing


def _picture_function(model: Any, folder: Path, config: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns the model's function from pictures to features."""
    if hasattr(model, "get_image_features"):
        return model.get_image_features
    if getattr(model, "main_input_name", "pixel_values") != "pixel_values":
        raise DataError(
            f"the model in {folder} is of type {config.get('model_type')!r}, which takes {model.main_input_name} and "
            "not pictures; give a vision model"
        )
    return model.forward


def _require_processor(folder: Path, config: Mapping[str, Any]) -> None:
    if "pretrained_cfg" in config:  # timm keeps it in config.json
        return
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise DataError(
            f"the model folder {folder} has no {_PROCESSOR_FILES[0]}, which says how its pictures are scaled and "
            "normalised, and a guess would describe them wrongly; get that file from where the model is from"
        )


def _takes_format(processor: Any) -> bool:
    parameters = inspect.signature(processor.preprocess).parameters.values()
    return any(p.name == "input_data_format" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _one_vector(output: Any, *, has_pooler: bool) -> Any:
    """Returns [d] of a model's output for one picture: pooled, or the mean over all tokens or places."""
    import torch

    if not isinstance(output, torch.Tensor | list | tuple):
        pooled = getattr(output, "pooler_output", None) if has_pooler else None
        output = output.last_hidden_state if pooled is None else pooled
    features = output if isinstance(output, torch.Tensor) else output[0]
    if features.ndim == 4:  # [1, d, height, width]
        return features[0].flatten(1).mean(dim=1)
    if features.ndim == 3:  # [1, tokens, d]
        return features[0].mean(dim=0)
    return features.flatten() if features.ndim == 1 or len(features) == 1 else features.mean(dim=0)


def _cut_to_aspect(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    rows, columns = min(height, _MAX_ASPECT * width), min(width, _MAX_ASPECT * height)
    top, left = (height - rows) // 2, (width - columns) // 2
    return np.ascontiguousarray(picture[top : top + rows, left : left + columns])


def _digest(folder: Path, *, with_code: bool) -> str:
    """Returns 16 hexadecimal digits of what decides the vectors: settings, weights, and the code that runs."""
    digest = hashlib.sha256()
    for name in ("config.json", *_PROCESSOR_FILES):
        if (folder / name).is_file():
            try:
                values = json.loads((folder / name).read_text(encoding="utf-8"), object_hook=_without_volatile_keys)
            except ValueError as error:
                raise DataError(
                    f"{folder / name} is no JSON ({error}), so it does not say how the model in its folder sees "
                    "pictures; get that file again, or delete it if the model needs none"
                ) from error
            digest.update(f"{name}\n{json.dumps(values, sort_keys=True)}\n".encode())
    for path in [*_weight_files(folder), *(sorted(folder.glob("*.py")) if with_code else ())]:
        with path.open("rb") as stream:
            digest.update(f"{path.name}\n{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _without_volatile_keys(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _VOLATILE_KEYS}


def _weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers reads the weights from: the first kind that is there."""
    first = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if first is None:
        return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    if first.suffix != ".json":
        return [first]
    names = json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]
