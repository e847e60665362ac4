"""Does a teacher fit a run, and what does a reconstruction section need?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ove.config.reconstruction import FeatureReconstructionConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import CheckpointError
from megatron_ove.objectives.reconstruction.teacher import read_teacher_config, resolve_teacher


def teacher_of(section: FeatureReconstructionConfig, infos: Sequence[Any]) -> Mapping[str, Any]:
    """Returns the teacher with its very folder and the fingerprint of its weights.

    Raises:
        CheckpointError: there is none, or its weights have changed.
    """
    del infos
    return {"teacher": resolve_teacher(section.teacher).model_dump()}


def find_teacher_mismatches(run: TrainConfig, name: str, sets: Mapping[str, Any]) -> list[str]:
    """Returns a sentence if the teacher cannot see what the run shows."""
    del sets
    section = run.objectives[name]
    assert isinstance(section, FeatureReconstructionConfig)
    try:
        teacher = read_teacher_config(resolve_teacher(section.teacher).path)
    except CheckpointError as error:
        return [f"objectives.{name}.teacher: {error}"]
    problems = []
    if teacher.patch_size != run.encoder.patch_size:
        problems.append(
            f"objectives.{name}.teacher: {section.teacher.path} has patches of {teacher.patch_size} pixels and the run "
            f"has some of {run.encoder.patch_size}, so they do not see the same; use a teacher with the run's patches"
        )
    size = run.parallel.tensor_model_parallel_size
    if teacher.num_attention_heads % size or teacher.ffn_hidden_size % size:
        problems.append(
            f"objectives.{name}.teacher: its {teacher.num_attention_heads} heads and MLP of {teacher.ffn_hidden_size} "
            f"do not divide over parallel.tensor_model_parallel_size = {size}; use another number of ranks"
        )
    return problems


def no_held_out_mismatches(run: TrainConfig, name: str, shards: Any) -> list[str]:
    """Any held-out set of the source's kind can be measured."""
    del run, name, shards
    return []


def teacher_differences(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Yields a clause if the teacher is another one than the run began with."""
    before, now = (section["teacher"].get("fingerprint") for section in (there, here))
    if before != now:
        yield (
            f"objectives.{name}.teacher is {there['teacher']['path']} (fingerprint {before}) there and "
            f"{here['teacher']['path']} (fingerprint {now}) here"
        )


def describe_features(section: Mapping[str, Any]) -> str:
    """Says of a stored section what it learns."""
    return f"to keep the features of {Path(section['teacher']['path']).name}"


def describe_pixels(section: Mapping[str, Any]) -> str:
    """Says of a stored section what it learns."""
    return "to keep the pixels" + (" and their edges" if section.get("structure_weight") else "")
