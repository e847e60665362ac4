"""From a HuggingFace folder of this architecture to a checkpoint that initialises runs."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_ove.convert.checkpoint_files import write_encoder_checkpoint
from megatron_ove.convert.hf_config import DEFAULT_IMAGE_SIZE, from_hf_config
from megatron_ove.convert.hf_folder import read_hf_folder
from megatron_ove.convert.mapping import to_mcore

logger = logging.getLogger(__name__)


def import_pretrained(hf_dir: str | Path, output_checkpoint_dir: str | Path) -> Path:
    """Writes an encoder-only checkpoint with the weights of a HuggingFace folder; values and dtypes stay as they are.

    Args:
        hf_dir: folder with config.json and safetensors, of model_type onevision_encoder.
        output_checkpoint_dir: new checkpoint folder.

    Returns:
        The checkpoint folder.

    Raises:
        CheckpointError: another architecture; missing, unexpected or mis-shaped tensors; a file that cannot be read or
            written.
    """
    hf_state, values = read_hf_folder(hf_dir)
    config = from_hf_config(values, origin=f"{hf_dir}/config.json")
    state = to_mcore(hf_state, config)
    facts = {"imported_from": str(hf_dir), "image_size": values.get("image_size", DEFAULT_IMAGE_SIZE)}
    path = write_encoder_checkpoint(output_checkpoint_dir, state, config, facts=facts)
    logger.info("imported %d tensors of %s into %s", len(hf_state), hf_dir, path)
    return path
