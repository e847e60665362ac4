"""From a checkpoint to a HuggingFace folder that loads with AutoModel.from_pretrained(..., trust_remote_code=True)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from megatron_ove.convert.checkpoint_files import encoder_state_from_checkpoint, read_checkpoint_facts
from megatron_ove.convert.class_centers import load_class_head, load_words, objectives_with_centers
from megatron_ove.convert.hf_config import DEFAULT_IMAGE_SIZE, to_hf_config
from megatron_ove.convert.hf_folder import write_hf_folder
from megatron_ove.convert.mapping import to_hf
from megatron_ove.convert.model_card import describe_model
from megatron_ove.vocabulary import vocabulary_path

logger = logging.getLogger(__name__)


def export_checkpoint(
    checkpoint_dir: str | Path, output_dir: str | Path, *, with_class_centers: bool = False, averaged: bool = False
) -> Path:
    """Writes the encoder of a checkpoint as a HuggingFace folder; no other process, GPU or class center is needed.

    Weights keep their dtype: a bf16 run is exported in bf16, the precision it was trained to run in. Averages are fp32.

    Args:
        checkpoint_dir: a checkpoint folder.
        output_dir: new folder: model.safetensors, config.json, the modelling code, preprocessor_config.json, README.md,
            and the vocabularies that the checkpoint carries.
        with_class_centers: whether class_centers/<objective>.safetensors are written too: "class_centers" [c, e] fp32
            in the order of class ids and, of a head with `centering: embeddings`, "embedding_mean" [e], which is to be
            taken from an embedding before it is compared with them.
        averaged: whether the moving average of the weights is written instead of the weights.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint is not whole, or the folder exists or cannot be written.
    """
    state, config = encoder_state_from_checkpoint(checkpoint_dir, averaged=averaged)
    facts = read_checkpoint_facts(checkpoint_dir, verify=False)  # compared a moment ago
    published = to_hf(state, config)
    dtype = next(iter(published.values())).dtype
    values = to_hf_config(config, image_size=trained_image_size(facts), dtype=dtype)
    num_parameters = sum(tensor.numel() for tensor in published.values())
    num_words = _count_words(checkpoint_dir, facts)
    files = {name: (Path(checkpoint_dir) / name).read_bytes() for name in num_words}
    heads = objectives_with_centers(checkpoint_dir) if with_class_centers else []
    files |= {class_centers_path(name): class_centers_file(checkpoint_dir, name) for name in heads}
    card = describe_model(
        values, facts, num_parameters=num_parameters, num_words=num_words, has_class_centers=bool(heads)
    )
    path = write_hf_folder(output_dir, published, values, model_card=card, files=files)
    logger.info("exported %d tensors, %d parameters, to %s", len(published), num_parameters, path)
    return path


def class_centers_path(objective: str) -> str:
    """Returns where an export keeps the class centers of an objective."""
    return f"class_centers/{objective}.safetensors"


def class_centers_file(checkpoint_dir: str | Path, objective: str) -> bytes:
    """Returns the content of an export's file of class centers."""
    head = load_class_head(checkpoint_dir, objective, verify=False)
    tensors = {"class_centers": head.centers}
    return save(tensors if head.mean is None else {**tensors, "embedding_mean": head.mean})


def _count_words(checkpoint_dir: str | Path, facts: Mapping[str, Any]) -> dict[str, int]:
    """Returns file -> its words, for every vocabulary that a checkpoint carries."""
    found = {name: load_words(checkpoint_dir, name) for name in facts["config"].get("objectives", {})}
    return {vocabulary_path(name): len(words) for name, words in found.items() if words is not None}


def trained_image_size(facts: Mapping[str, Any]) -> int:
    """Returns the largest `image_size` of a run in pixels, or what an imported model said of itself."""
    imported = facts.get("image_size", DEFAULT_IMAGE_SIZE)
    sources = facts["config"].get("data", {}).get("sources", {}).values()
    sizes = [source["image_size"] for source in sources if "image_size" in source]  # a number, a list or a range
    values = [size.values() if isinstance(size, dict) else [size] if isinstance(size, int) else size for size in sizes]
    return max(itertools.chain(*values), default=imported)
