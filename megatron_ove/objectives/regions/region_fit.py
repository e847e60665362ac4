"""Do the boxes of shard sets fit a head on regions?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.regions import RegionConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import DataError
from megatron_ove.objectives.regions.region_labels import LabelBoxes, labels_of_section, vocabulary_of
from megatron_ove.shards.documents import BOX_UNITS
from megatron_ove.shards.format import DatasetInfo
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.token_cache import TextTokenizer
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary, describe_difference

_PROBED = 32
"""Documents of a set that are looked into at a start."""
_COUNTED_ROWS = 1 << 20
"""Samples, from the first on, whose boxes are counted."""


def region_class_count(section: PartialFCConfig, infos: Sequence[DatasetInfo]) -> Mapping[str, Any]:
    """Returns the number of classes: of the vocabulary or tokenizer that is named, else of the shard sets.

    Raises:
        DataError: neither says it, or a file cannot be read.
    """
    if section.regions.labels == "tokens":
        tokenizer, given = TextTokenizer(section.regions.tokenizer or ""), section.regions.tokenizer_fingerprint
        if given not in (None, tokenizer.fingerprint):
            raise DataError(
                f"{tokenizer.path} is another tokenizer than regions.tokenizer_fingerprint = {given} says; put the "
                "right one there, or begin a new run"
            )
        regions = section.regions.model_copy(update={"tokenizer_fingerprint": tokenizer.fingerprint})
        return {"num_classes": section.num_classes or tokenizer.vocab_size, "regions": regions.model_dump()}
    if section.num_classes is not None:
        return {}
    if section.regions.vocabulary is not None:
        return {"num_classes": len(Vocabulary.load(section.regions.vocabulary))}
    most = max(info.num_classes for info in infos)
    if not most:
        raise DataError(
            "regions.vocabulary is not given, and the sources' shard sets have no classes, so it is not known what "
            "words there are; name a vocabulary.json"
        )
    return {"num_classes": most}


def region_mismatches(run: TrainConfig, name: str, sets: Mapping[str, ShardSet]) -> list[str]:
    """Returns a sentence for everything in the boxes of its sources that the head could not learn."""
    section = _section(run, name)
    problems = [sentence for source, shards in sets.items() for sentence in no_boxes(name, source, shards)]
    if problems or not sets:
        return problems
    directories = [Path(shards.directory) for shards in sets.values()]
    try:
        count = _num_labels(section, directories[0])
    except DataError as error:
        return [f"objectives.{name}.regions: {error}"]
    if (section.num_classes or count) < count:
        problems.append(
            f"objectives.{name}.num_classes = {section.num_classes} is smaller than the {count} classes that its "
            f"regions can have, so some would have no class center; set it to {count}"
        )
    find_labels = labels_of_section(section.regions, directories[0])
    for source, shards in sets.items():
        problems += _nothing_to_name(name, source, shards, section.regions, find_labels)
    if section.regions.labels == "vocabulary" and section.regions.vocabulary is None:
        for other in directories[1:]:
            problems += _word_difference(f"objectives.{name} reads", directories[0], other)
    return problems


def region_doubts(section: PartialFCConfig, sets: Mapping[str, ShardSet]) -> list[str]:
    """Returns a sentence about samples that have no boxes."""
    doubts = []
    for source, shards in sets.items():
        boxes = shards.index.columns.get("boxes")
        if boxes is None:
            continue
        counts = boxes[: min(len(shards), _COUNTED_ROWS)]
        without = int((counts == 0).sum())
        if without:
            doubts.append(
                f"{without:,} of the first {len(counts):,} samples of data.sources.{source} have no box of any unit "
                "and teach nothing; leave them out of the set, or do not mind it"
            )
    return doubts


def region_held_out_mismatches(run: TrainConfig, name: str, shards: ShardSet) -> list[str]:
    """Returns a sentence for everything in which a held-out set differs from what the head trains on."""
    section, place = _section(run, name), f"evaluation.sets.{name}"
    problems = [f"{place}: {sentence}" for sentence in no_boxes(name, section.sources[0], shards)]
    if problems or section.regions.labels == "tokens" or section.regions.vocabulary is not None:
        return problems
    trained = Path(run.data.sources[section.sources[0]].paths[0])
    return _word_difference(f"{place}:", trained, Path(shards.directory))


def _num_labels(section: PartialFCConfig, directory: Path) -> int:
    if section.regions.labels == "tokens":
        return TextTokenizer(section.regions.tokenizer or "").vocab_size
    return len(vocabulary_of(section.regions, directory))


def no_boxes(name: str, source: str, shards: ShardSet) -> list[str]:
    """Returns a sentence if a set has no boxes that an objective could look at."""
    path = shards.directory
    if not shards.info.has_pages:
        return [
            f"objectives.{name} looks at regions of data.sources.{source}, but {path} holds samples of kind "
            f"{shards.info.kind}, which have no boxes; name sources of kind document"
        ]
    boxes = shards.index.columns.get("boxes")
    if boxes is not None and not boxes[: min(len(shards), _COUNTED_ROWS)].any():
        return [
            f"objectives.{name} looks at regions of data.sources.{source}, but no sample of {path} has a box; write "
            "the set with boxes of words, lines or characters"
        ]
    return []


def _nothing_to_name(
    name: str, source: str, shards: ShardSet, section: RegionConfig, find_labels: LabelBoxes
) -> list[str]:
    """Says if no document of some, evenly spaced, has a box of the unit, or none with a label."""
    rows = sorted({number * len(shards) // _PROBED for number in range(_PROBED)}) if len(shards) else []
    documents = []
    for row in rows:
        try:
            documents.append(shards.read_document(row))
        except DataError:
            continue  # is counted where it is trained on
    boxes = [document.boxes[section.unit] for document in documents]
    if documents and not any(len(one) for one in boxes):
        there = [unit for unit in BOX_UNITS if any(len(document.boxes[unit]) for document in documents)]
        return [
            f"objectives.{name}.regions.unit = {section.unit}, but none of {len(documents)} documents of "
            f"{shards.directory} (data.sources.{source}) has such a box (they have {', '.join(there) or 'none'}); use "
            "another unit, or write the set with them"
        ]
    if documents and not any(any(find_labels(*pair)) for pair in zip(documents, boxes, strict=True)):
        return [
            f"objectives.{name}: in none of {len(documents)} documents of {shards.directory} (data.sources.{source}) "
            f"does a box of {section.unit} hold anything that is a class, so nothing could be learned; use the "
            "vocabulary that the set was made with"
        ]
    return []


def _word_difference(begin: str, one: Path, other: Path) -> list[str]:
    files = one / VOCABULARY_FILE, other / VOCABULARY_FILE
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return []
    difference = describe_difference(Vocabulary.load(files[0]).words, Vocabulary.load(files[1]).words)
    if not difference:
        return []
    return [
        f"{begin} {other} with other words than {one} ({difference}), so equal classes would mean different things; "
        "write both sets with one vocabulary, or name one in regions.vocabulary"
    ]


def _section(run: TrainConfig, name: str) -> PartialFCConfig:
    section = run.objectives[name]
    assert isinstance(section, PartialFCConfig)
    return section
