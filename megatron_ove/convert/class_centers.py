"""Class centers of a checkpoint, what embeddings are compared with them, and the words that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ove.convert.checkpoint_files import read_checkpoint_facts, read_tensors, stored_keys
from megatron_ove.errors import CheckpointError
from megatron_ove.parallel.class_order import rows_of_classes
from megatron_ove.vocabulary import Vocabulary, vocabulary_path


@dataclass(frozen=True)
class ClassHead:
    """A trained head: what embeddings are compared with, and how.

    Attributes:
        centers: [c, e] fp32, in the order of class ids, not normalized.
        mean: [e] fp32, taken from embeddings before they are compared: the running mean of a head with `centering:
            embeddings`; None = nothing.
    """

    centers: Tensor
    mean: Tensor | None = None

    def __len__(self) -> int:
        """c, the number of classes."""
        return len(self.centers)

    def of_classes(self, classes: Tensor | slice) -> ClassHead:
        """Returns the head of some of its classes, in the order of `classes`."""
        return ClassHead(self.centers[classes], self.mean)

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Returns [n, c] fp32: cosine of embeddings [n, e], as an encoder puts them out, with every class center."""
        embeddings = embeddings.float()
        if self.mean is not None:
            embeddings = embeddings - self.mean.to(embeddings.device)
        return F.normalize(embeddings, dim=-1) @ self._directions.to(embeddings.device).T

    @cached_property
    def _directions(self) -> Tensor:
        """[c, e], centers of length 1: a head is asked about one picture after the other."""
        return F.normalize(self.centers, dim=-1)


def load_class_head(checkpoint_dir: str | Path, objective: str, *, verify: bool = True) -> ClassHead:
    """Reads the class centers of one objective, whatever number of ranks wrote them, and its mean.

    Args:
        checkpoint_dir: a checkpoint folder.
        objective: name of the objective in the run's configuration.
        verify: whether every file's checksum is compared first.

    Returns:
        The head, on the CPU.

    Raises:
        CheckpointError: the folder is not a whole checkpoint, or holds no such table.
    """
    facts = read_checkpoint_facts(checkpoint_dir, verify=verify)
    objectives = facts["config"].get("objectives", {})
    key = f"objectives.{objective}.weight"
    if objective in objectives and is_on_regions(objectives[objective]):
        raise CheckpointError(
            f"objective '{objective}' of {checkpoint_dir} learned what stands in boxes, so its class centers say "
            "nothing of whole samples; name an objective with level: sample, or measure it with evaluation.sets while "
            "it trains"
        )
    if objective in objectives:
        tensors = read_tensors(checkpoint_dir, key)
        if key in tensors:
            num_classes = len(tensors[key])
            centers = tensors[key][rows_of_classes(torch.arange(num_classes), num_classes)].float()
            return ClassHead(centers, _read_mean(checkpoint_dir, objective, objectives[objective]))
    known = ", ".join(objectives) or "none: it holds an encoder only"
    raise CheckpointError(
        f"the checkpoint {checkpoint_dir} has no class centers of an objective '{objective}'; its objectives are "
        f"{known}; name one of them"
    )


def objectives_with_centers(checkpoint_dir: str | Path) -> list[str]:
    """Returns the objectives of a checkpoint that have class centers of whole samples in it, in the order of its
    configuration."""
    objectives = read_checkpoint_facts(checkpoint_dir, verify=False)["config"].get("objectives", {})
    keys = stored_keys(checkpoint_dir)
    return [
        name
        for name, section in objectives.items()
        if f"objectives.{name}.weight" in keys and not is_on_regions(section)
    ]


def is_on_regions(section: Mapping[str, Any]) -> bool:
    """Whether a stored section's classes are those of boxes."""
    return section.get("level", "sample") == "region"


def _read_mean(checkpoint_dir: str | Path, objective: str, section: Mapping[str, Any]) -> Tensor | None:
    if section.get("centering", "none") != "embeddings":
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
