"""Words by class centers: which words a trained encoder reads on a picture, and on which pages of a set it sees a word.

Training pulls a page's embedding towards the class centers of its words, so both are cosines between the two. Pictures
take the way of training and evaluation: the page tools' conversion, a shard set, the OCR source.

Shape letters: e embedding, c classes that have a word, n pages.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.checkpoint.manifest import checkpoints_at, structural_problem
from megatron_ove.config.objectives import source_names
from megatron_ove.convert.checkpoint_files import read_checkpoint_facts
from megatron_ove.convert.class_centers import ClassHead, load_class_head, load_words
from megatron_ove.convert.encoder_inference import load_encoder_for_inference
from megatron_ove.convert.hf_export import trained_image_size
from megatron_ove.errors import CheckpointError, ConfigError, DataError
from megatron_ove.evaluation.embedding import EncoderCallable, SampleSettings, embed_shard_set
from megatron_ove.evaluation.retrieval import average_precision, mean_over_queries
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.ocr.words import segment_words
from megatron_ove.preprocess.pictures import JpegPreparer
from megatron_ove.rejects import RejectsFile, read_rejects
from megatron_ove.shards.format import PICTURE_MEMBER
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.writer import ShardWriter
from megatron_ove.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_LONGEST_SIDE, _JPEG_QUALITY = 8192, 92
"""A square of this side is the largest picture that a shard takes; what an encoder sees is far smaller."""
_MAX_NAMED_WORDS = 5


@dataclass(frozen=True)
class WordReader:
    """A checkpoint's encoder and the words that one of its objectives learned.

    Attributes:
        checkpoint: the folder.
        encode: the encoder.
        head: of the objective, in the order of the words.
        vocabulary: c words.
        settings: how pictures become patches: as the objective's source makes them, with its largest budget.
        device: of the encoder.
    """

    checkpoint: Path
    encode: EncoderCallable
    head: ClassHead
    vocabulary: Vocabulary
    settings: SampleSettings
    device: torch.device


@dataclass(frozen=True)
class ScoredWord:
    """A word, its class, and the cosine between a page and its class center."""

    word: str
    index: int
    score: float


@dataclass(frozen=True)
class PictureWords:
    """What was read on a picture.

    Attributes:
        file: the picture.
        words: best first; none when there is a problem.
        problem: a sentence that says why the picture cannot be used; "" = it can.
    """

    file: str
    words: tuple[ScoredWord, ...]
    problem: str = ""


@dataclass(frozen=True)
class FoundPage:
    """A page and how near it is to a word.

    Attributes:
        key: of the sample.
        shard: file that holds it, relative to the set's folder.
        score: cosine between page and class center.
        holds: whether the word is among its labels; None where the set has no vocabulary to say so.
    """

    key: str
    shard: str
    score: float
    holds: bool | None


@dataclass(frozen=True)
class WordPages:
    """Where a word was found.

    Attributes:
        word: as the vocabulary has it.
        index: its class.
        pages: nearest first.
        num_holding: pages of the set with this label; None where the set has no vocabulary.
        average_precision: of the order of all pages; None where no page is known to hold the word.
    """

    word: str
    index: int
    pages: tuple[FoundPage, ...]
    num_holding: int | None
    average_precision: float | None


def load_word_reader(
    given: str | Path, *, objective: str | None = None, vocabulary: str | Path | None = None
) -> WordReader:
    """Loads what reading words takes; starts a process group of one, which the caller ends with `destroy_topology`.

    Args:
        given: a checkpoint, or a run folder, of which the newest finished one is taken.
        objective: whose class centers are meant; None = the only one that learned words.
        vocabulary: its words, for a checkpoint that carries none.

    Raises:
        CheckpointError: no whole checkpoint, one without such an objective, or one without words and none given.
        ConfigError: an objective that cannot be meant, or a vocabulary beside the checkpoint's own.
        DataError: a file that is no vocabulary.
    """
    given = Path(given)
    checkpoint = next((path for path in checkpoints_at(given) if structural_problem(path) is None), given)
    facts = read_checkpoint_facts(checkpoint)
    name = _choose_objective(facts["config"], checkpoint, objective)
    words = _find_words(checkpoint, name, vocabulary)
    head = load_class_head(checkpoint, name, verify=False)  # all checksums were compared a moment ago
    if len(words) > len(head):
        raise ConfigError(
            f"{vocabulary} has {len(words)} words, more than the {len(head)} classes of {name} in {checkpoint}, so "
            "it is the vocabulary of another run; give the one its shard set was written with"
        )
    if len(words) < len(head):
        logger.warning("%d of the %d classes of %s have no word.", len(head) - len(words), len(head), name)
    encoder, config = load_encoder_for_inference(checkpoint, verify=False)
    device = next(encoder.parameters()).device
    source = facts["config"]["data"]["sources"][source_names(facts["config"]["objectives"][name])[0]]
    budgets = source["max_patches"]  # a number or a list
    settings = SampleSettings(
        patch_size=config.patch_size,
        image_size=trained_image_size(facts),
        max_patches=budgets if isinstance(budgets, int) else max(budgets),
    )

    @torch.inference_mode()
    def encode(batch: Batch) -> Tensor:
        return encoder(batch.main).sample_embeddings(batch.num_samples)

    return WordReader(checkpoint, encode, head.of_classes(slice(len(words))), words, settings, device)


def read_pictures(reader: WordReader, files: Sequence[str | Path], *, top: int) -> list[PictureWords]:
    """Returns the `top` words whose class centers are nearest to each picture, in the order of `files`."""
    with tempfile.TemporaryDirectory(prefix="megatron-ove-read-") as folder:
        shards, problems = _store_pictures(files, Path(folder))
        rows: dict[int, Tensor] = {}
        if shards is not None:
            embedded = embed_shard_set(reader.encode, shards, reader.settings, device=reader.device)
            rows = dict(zip(map(int, embedded.keys), embedded.embeddings, strict=True))
            shards.close()
    return [
        PictureWords(str(file), (), problems[number])
        if number in problems
        else PictureWords(str(file), _best_words(reader, rows[number], top))
        for number, file in enumerate(files)
    ]


def find_pages(reader: WordReader, shards: ShardSet, words: Sequence[str], *, top: int) -> list[WordPages]:
    """Returns, for each word, the `top` samples of a shard set that are nearest to its class center.

    Raises:
        ConfigError: a word without a class, or a set that does not fit the encoder.
        DataError: a sample that cannot be read, or a set whose vocabulary is damaged.
    """
    classes = [word_class(reader, word) for word in words]
    stored = shards.read_vocabulary()  # its ids may be others than the checkpoint's
    embedded = embed_shard_set(reader.encode, shards, reader.settings, device=reader.device)
    scores = reader.head.of_classes(torch.tensor(classes)).cosines(embedded.embeddings).T  # [words, n]
    found = []
    for index, of_word in zip(classes, scores, strict=True):
        word = reader.vocabulary.words[index]
        holds = None if stored is None else (embedded.labels == stored.ids.get(word, len(stored))).any(dim=1)  # [n]
        nearest = of_word.argsort(descending=True, stable=True)[:top].tolist()
        pages = tuple(
            FoundPage(
                embedded.keys[i],
                str(shards.shard_path(i).relative_to(shards.directory)),
                float(of_word[i]),
                None if holds is None else bool(holds[i]),
            )
            for i in nearest
        )
        count = None if holds is None else int(holds.sum())
        precision = mean_over_queries(average_precision(of_word[None], holds[None])) if holds is not None else None
        found.append(WordPages(word, index, pages, count, precision if count else None))
    return found


def word_class(reader: WordReader, text: str) -> int:
    """Returns the class of a word, which may be written as on a page: in capitals, with marks around it.

    Raises:
        ConfigError: it has none.
    """
    vocabulary = reader.vocabulary
    parts = segment_words(text)
    for candidate in (text, *parts) if len(parts) == 1 else (text,):
        if candidate in vocabulary.ids:
            return vocabulary.ids[candidate]
    alike = [word for word in vocabulary.words if word[:3] == text.casefold()[:3]] or vocabulary.words
    raise ConfigError(
        f"the word '{text}' is not among the {len(vocabulary)} words that {reader.checkpoint} learned, so no class "
        f"center stands for it; give one that is, for instance {', '.join(alike[:_MAX_NAMED_WORDS])}"
    )


def _choose_objective(config: Mapping[str, Any], checkpoint: Path, given: str | None) -> str:
    """Returns the name of an objective whose source is of kind ocr."""
    objectives = config.get("objectives", {})
    sources = config.get("data", {}).get("sources", {})
    kinds = {
        name: sources[source_names(item)[0]]["kind"]
        for name, item in objectives.items()
        if "num_classes" in item and item.get("level", "sample") == "sample"
    }
    candidates = [name for name, kind in kinds.items() if kind == "ocr"]
    known = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none: it holds an encoder only"
    if not candidates:
        raise CheckpointError(
            f"the checkpoint {checkpoint} learned no words, because it has no objective with a source of kind ocr (its "
            f"objectives are {known}); give a checkpoint of a run that has one"
        )
    if given is not None and given not in candidates:
        raise ConfigError(
            f"--objective {given} learned no words in {checkpoint}, whose objectives are {known}; give "
            f"{' or '.join(candidates)}"
        )
    if given is None and len(candidates) > 1:
        raise ConfigError(
            f"several objectives of {checkpoint} learned words ({', '.join(candidates)}), each with classes of its "
            "own; choose one with --objective"
        )
    return given or candidates[0]


def _find_words(checkpoint: Path, objective: str, given: str | Path | None) -> Vocabulary:
    own = load_words(checkpoint, objective)
    if own is not None and given is not None:
        raise ConfigError(
            f"--vocabulary {given} is not needed, because the checkpoint {checkpoint} carries the {len(own)} words of "
            f"{objective}; leave it away"
        )
    if own is None and given is None:
        raise CheckpointError(
            f"the checkpoint {checkpoint} does not carry the words of {objective}, because its shard set had no "
            "vocabulary beside it; give the vocabulary.json that the set was written with by --vocabulary"
        )
    return own if own is not None else Vocabulary.load(str(given))


def _store_pictures(files: Sequence[str | Path], folder: Path) -> tuple[ShardSet | None, dict[int, str]]:
    """Writes pictures to a shard set with their numbers as keys, as the page tools write pages.

    Returns:
        The set, None where no picture is usable; and number of a picture -> a sentence that says why it is not.
    """
    prepare = JpegPreparer(longest_side=_LONGEST_SIDE, quality=_JPEG_QUALITY)
    record = folder / "rejects.jsonl"
    with RejectsFile(record, stage="read") as rejects:
        writer = ShardWriter(folder / "pictures", kind="ocr", num_classes=1, label_width=1, rejects=rejects)
        for number, file in enumerate(files):
            try:
                picture = prepare(InputFile(Path(file), str(file), str(number)))
            except DataError as error:
                rejects.add(str(number), str(error))
                continue
            writer.add(str(number), {PICTURE_MEMBER: picture}, np.array([-1]))
        if len(writer):
            writer.close()
        else:
            writer.discard()
    problems = {int(reject["file"]): reject["reason"] for reject in read_rejects(record)}
    for number, reason in problems.items():
        prefix = f"{number}.{PICTURE_MEMBER}: "  # how the writer names it
        if reason.startswith(prefix):
            problems[number] = f"{files[number]} cannot be used: {reason.removeprefix(prefix)}"
    return (ShardSet.open(folder / "pictures") if len(writer) else None), problems


def _best_words(reader: WordReader, embedding: Tensor, top: int) -> tuple[ScoredWord, ...]:
    """`embedding`: [e], of one page."""
    scores, classes = reader.head.cosines(embedding[None])[0].topk(min(top, len(reader.vocabulary)))
    words = reader.vocabulary.words
    pairs = zip(scores.tolist(), classes.tolist(), strict=True)
    return tuple(ScoredWord(words[index], index, score) for score, index in pairs)
