"""The words of a run's heads: found beside its shard sets, compared with its checkpoint, carried into every save.

Class centers are numbers; that class 17 means "law" is known only to the vocabulary its labels were made with. So it
travels with them, and a run never goes on with another one. Files are read by the main rank alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ove.config.objectives import ObjectiveConfig, PartialFCConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import CheckpointError, DataError, MegatronOveError
from megatron_ove.shards.format import DatasetInfo, read_vocabulary
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary, describe_difference, vocabulary_path

logger = logging.getLogger(__name__)

_WORDED = ("ocr", "document")
"""Kinds of shard sets whose labels are words."""


@dataclass(frozen=True)
class _StoredWords:
    """A vocabulary as it lies in a file; a few MiB, where its words as objects would take ten times as much."""

    file: Path
    content: bytes

    def words(self) -> tuple[str, ...]:
        return Vocabulary.decode(self.content, self.file).words


class RunVocabularies:
    """The vocabularies of the objectives that have a source of pages; on the main rank, nothing on the others."""

    def __init__(self, config: TrainConfig, *, is_main: bool) -> None:
        """Reads the vocabularies beside the run's shard sets; collective over all ranks.

        Raises:
            DataError: on all ranks, when one is damaged, or is not that of its shard set.
        """
        self._is_main = is_main
        self._sources = {
            name: (source, Path(config.data.sources[source].paths[0]))
            for name, objective in config.objectives.items()
            for source in _sources_of_pages(config, objective)[:1]  # all of them have the same words
        }
        self._given = {
            name: Path(section.regions.vocabulary)
            for name, section in config.objectives.items()
            if isinstance(section, PartialFCConfig) and section.level == "region" and section.regions.vocabulary
        }
        self._stored: dict[str, _StoredWords] = {}
        self._on_main(self._read_sources)

    @property
    def files(self) -> Mapping[str, bytes]:
        """What a checkpoint keeps: path relative to its folder -> content."""
        return {vocabulary_path(name): stored.content for name, stored in self._stored.items()}

    def continue_from(self, checkpoint: Path) -> None:
        """Compares the words with those of a checkpoint, and takes over what only it has; collective over all ranks.

        Raises:
            CheckpointError: on all ranks, when a class stands for another word there.
        """
        self._on_main(lambda: self._compare(checkpoint))

    def _read_sources(self) -> None:
        for name, (source, folder) in self._sources.items():
            if name in self._given:
                file = self._given[name]
                words = len(Vocabulary.load(file))
                self._stored[name] = _StoredWords(file, file.read_bytes())
                logger.info("The %d words of objectives.%s are those of %s.", words, name, file)
                continue
            file = folder / VOCABULARY_FILE
            if not file.exists():
                if folder.is_dir():
                    logger.info("%s does not exist, so classes of objectives.%s have no words.", file, name)
                continue
            try:
                vocabulary = read_vocabulary(folder, DatasetInfo.read(folder))
            except DataError as error:
                raise DataError(f"data.sources.{source}: {error}") from error
            assert vocabulary is not None
            self._stored[name] = _StoredWords(file, file.read_bytes())
            logger.info("The %d words of objectives.%s are those of %s.", len(vocabulary), name, file)

    def _compare(self, checkpoint: Path) -> None:
        for name in self._sources:
            file = checkpoint / vocabulary_path(name)
            if not file.exists():
                continue  # saved by an earlier version, or without a vocabulary beside the shard set
            there, here = _StoredWords(file, file.read_bytes()), self._stored.get(name)
            if here is None:
                logger.info("The words of objectives.%s are those of %s, as before.", name, file)
                self._stored[name] = there
                continue
            # To decode hundreds of thousands of words takes seconds, and equal files need it not.
            difference = there.content != here.content and describe_difference(there.words(), here.words())
            if difference:
                raise CheckpointError(
                    f"the checkpoint {checkpoint} learned the words of {file}, and {here.file} has others "
                    f"({difference}), so classes of objectives.{name} would change their meaning; use the shard set "
                    "that belongs to the checkpoint's vocabulary, or another run_dir to train anew"
                )

    def _on_main(self, action: Callable[[], None]) -> None:
        """Runs `action` on the main rank; an error of it becomes one of all ranks."""
        shared: list[Any] = [None]
        if self._is_main:
            try:
                action()
            except MegatronOveError as error:
                shared = [error]
            except OSError as error:
                shared = [DataError(f"{error.filename} cannot be read ({error.strerror}); check the disk")]
        dist.broadcast_object_list(shared, src=0)
        if shared[0] is not None:
            raise type(shared[0])(str(shared[0]), on_every_rank=True)


def _sources_of_pages(config: TrainConfig, objective: ObjectiveConfig) -> list[str]:
    """Returns the sources whose words an objective's classes stand for; none of one without classes."""
    if not isinstance(objective, PartialFCConfig):
        return []
    if objective.level == "region" and objective.regions.labels == "tokens":
        return []  # a tokenizer knows them
    kinds = config.kinds.sources
    return [name for name in objective.sources if kinds[config.data.sources[name].kind].shard_kind in _WORDED]
