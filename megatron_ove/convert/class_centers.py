"""Class centers of a checkpoint, and the words that they stand for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_ove.convert.checkpoint_files import read_checkpoint_facts, read_tensors, stored_keys
from megatron_ove.errors import CheckpointError
from megatron_ove.parallel.class_order import rows_of_classes
from megatron_ove.vocabulary import Vocabulary, vocabulary_path


def load_class_centers(checkpoint_dir: str | Path, objective: str, *, verify: bool = True) -> Tensor:
    """Reads the class centers of one objective, whatever number of ranks wrote them.

    Args:
        checkpoint_dir: a checkpoint folder.
        objective: name of the objective in the run's configuration.
        verify: whether every file's checksum is compared first.

    Returns:
        [num_classes, e] fp32 on the CPU, in the order of class ids, not normalized.

    Raises:
        CheckpointError: the folder is not a whole checkpoint, or holds no such table.
    """
    facts = read_checkpoint_facts(checkpoint_dir, verify=verify)
    objectives = facts["config"].get("objectives", {})
    key = f"objectives.{objective}.weight"
    if objective in objectives:
        tensors = read_tensors(checkpoint_dir, key)
        if key in tensors:
            num_classes = len(tensors[key])
            return tensors[key][rows_of_classes(torch.arange(num_classes), num_classes)].float()
    known = ", ".join(objectives) or "none: it holds an encoder only"
    raise CheckpointError(
        f"the checkpoint {checkpoint_dir} has no class centers of an objective '{objective}'; its objectives are "
        f"{known}; name one of them"
    )


def objectives_with_centers(checkpoint_dir: str | Path) -> list[str]:
    """Returns the objectives of a checkpoint that have class centers in it, in the order of its configuration."""
    objectives = read_checkpoint_facts(checkpoint_dir, verify=False)["config"].get("objectives", {})
    keys = stored_keys(checkpoint_dir)
    return [name for name in objectives if f"objectives.{name}.weight" in keys]


def load_embedding_mean(checkpoint_dir: str | Path, objective: str) -> Tensor | None:
    """Returns what is to be taken from embeddings before they are compared with an objective's class centers.

    Returns:
        [e] fp32 on the CPU, the running mean of a head with `centering: embeddings`; None = nothing.
    """
    config = read_checkpoint_facts(checkpoint_dir, verify=False)["config"]["objectives"][objective]
    if config.get("centering", "none") != "embeddings":
        return None
    key = f"objectives.{objective}.embedding_mean"
    return read_tensors(checkpoint_dir, key)[key].float()


def load_words(checkpoint_dir: str | Path, objective: str) -> Vocabulary | None:
    """Returns the words of an objective's classes; None where the checkpoint carries none.

    It carries them when the shard set it was trained on had its vocabulary beside it.

    Raises:
        DataError: the file is damaged.
    """
    path = Path(checkpoint_dir) / vocabulary_path(objective)
    return Vocabulary.load(path) if path.exists() else None
