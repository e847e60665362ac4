"""Do tokenizer, decoder and shard sets fit a section of kind text_generation? And what of its texts is not used?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ove.config.text_generation import TextDecoderConfig, TextGenerationConfig, TextView
from megatron_ove.config.train import TrainConfig
from megatron_ove.convert.decoder_config import read_decoder_config
from megatron_ove.data.planner import PlannedBudget, PlannedSource
from megatron_ove.data.text_budget import count_texts, describe_counts, open_texts, text_budget
from megatron_ove.decoder.bridge import SHUFFLE_SIDE, count_image_tokens
from megatron_ove.errors import CheckpointError, ConfigError, DataError
from megatron_ove.objectives.text_generation.text_layout import TextTemplates, longest_text, tokenizer_at
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.token_cache import SourceTexts

_IDENTITY = (
    *("kind", "hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads", "ffn_hidden_size"),
    *("vocab_size", "norm_epsilon", "rope_theta", "tied"),
)


def decoder_of(section: TextGenerationConfig, infos: Sequence[Any]) -> Mapping[str, Any]:
    """Returns the decoder with all sizes, its folder's or the tokenizer's number of tokens, and the tokenizer's mark.

    Raises:
        CheckpointError, DataError: the folder or the tokenizer cannot be used, or sizes are given that the folder has
            not.
    """
    del infos
    given, tokenizer = section.decoder, tokenizer_at(section.tokenizer_path, section.normalisation)
    filled: dict[str, Any] = {"tokenizer_fingerprint": tokenizer.fingerprint}
    if section.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise DataError(
            f"{tokenizer.path} is another tokenizer than tokenizer_fingerprint = {section.tokenizer_fingerprint} says; "
            "put the right one there, or leave the fingerprint out of a new run"
        )
    if given.path is None:
        return {**filled, "decoder": given.model_copy(update={"vocab_size": given.vocab_size or tokenizer.vocab_size})
                .model_dump()}  # fmt: skip
    found = read_decoder_config(given.path)
    for field in sorted(given.model_fields_set - {"path"}):
        if getattr(given, field) not in (None, getattr(found, field)):
            raise DataError(
                f"decoder.{field} = {getattr(given, field)}, but {given.path} holds a decoder with "
                f"{getattr(found, field)}; leave out what the folder says"
            )
    return {**filled, "decoder": found.model_dump()}


def budgets(run: TrainConfig, name: str) -> list[PlannedBudget]:
    """Returns the room that texts and image tokens share in a microbatch."""
    section = _section(run, name)
    tokenizer = tokenizer_at(section.tokenizer_path, section.normalisation)
    templates = TextTemplates(section, tokenizer)

    def measure(texts: SourceTexts, source: PlannedSource, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros(0, dtype=np.int64)
        segments = source.segments(rows, seeds)
        images = count_image_tokens(section.bridge, segments.lengths, segments.grids)
        firsts = np.cumsum(segments.counts) - segments.counts
        view = section.view_of(source.name)
        return np.add.reduceat(images, firsts) + _text_tokens(section, view, templates, texts, rows)

    def largest(source: str) -> int:
        return section.max_text_tokens + most_image_tokens(run, section, source)

    return [text_budget(run, section.sources, tokenizer.fingerprint, measure=measure, largest=largest)]


def most_image_tokens(run: TrainConfig, section: TextGenerationConfig, source: str) -> int:
    """Returns the most image tokens of a sample whose pictures are as large as the configuration allows, whatever their
    aspect."""
    config = run.data.sources[source]
    pages = getattr(config, "max_pages", 1)
    patches = max(config.list_budgets(run.encoder.patch_size))
    if section.bridge.kind == "queries":
        return pages * (section.bridge.num_queries or 0)
    if section.bridge.kind == "pixel_shuffle":
        rows = np.arange(1, patches // pages + 1)
        return pages * int((-(-rows // SHUFFLE_SIDE) * -(-(patches // pages // rows) // SHUFFLE_SIDE)).max())
    return patches


def find_mismatches(run: TrainConfig, name: str, sets: Mapping[str, ShardSet]) -> list[str]:
    """Returns a sentence for everything that could not be learned.

    Args:
        run: the run.
        name: of the objective.
        sets: source -> opened shard set.
    """
    section, problems = _section(run, name), []
    try:
        decoder = _known_decoder(section)
        tokenizer = tokenizer_at(section.tokenizer_path, section.normalisation)
        templates = TextTemplates(section, tokenizer)
    except (CheckpointError, ConfigError, DataError) as error:
        return [f"objectives.{name}: {error}"]
    if tokenizer.vocab_size > (decoder.vocab_size or 0):
        problems.append(
            f"objectives.{name}: {tokenizer.path} has {tokenizer.vocab_size} tokens, more than decoder.vocab_size = "
            f"{decoder.vocab_size}; use the decoder's own tokenizer, or raise vocab_size"
        )
    for source, shards in sets.items():
        if not shards.info.has_pages:
            problems.append(
                f"objectives.{name}.source names {source}, whose set holds samples of kind {shards.info.kind} without "
                "any text; name sources of kind document"
            )
        # An answer may be written behind a whole text of several turns, or behind what stands before the only one.
        view = section.view_of(source)
        no_answer = sum(templates.overhead_of(view)) - 1  # there is no end token yet
        before = section.max_text_tokens if view == "turns" else no_answer
        written = before + (section.max_written_tokens or section.max_text_tokens)
        longest = max(section.max_text_tokens, written) + most_image_tokens(run, section, source)
        if longest > decoder.max_positions and decoder.kind == "opt":
            problems.append(
                f"objectives.{name}: texts of data.sources.{source} can have {longest} tokens with their pictures, "
                f"more than decoder.max_positions = {decoder.max_positions}; lower max_text_tokens or the "
                "pictures' max_patches, or use a bridge with fewer image tokens"
            )
    if not problems:
        try:
            open_texts(run, list(sets), tokenizer.fingerprint)
        except DataError as error:
            problems += str(error).split("\n")
    return problems


def find_doubts(run: TrainConfig, name: str, sets: Mapping[str, ShardSet], *, counts_samples: bool) -> list[str]:
    """Returns a sentence for everything of the texts that a run does not use."""
    del counts_samples
    section = _section(run, name)
    tokenizer = tokenizer_at(section.tokenizer_path, section.normalisation)
    templates = TextTemplates(section, tokenizer)
    doubts = []
    for source, texts in open_texts(run, list(sets), tokenizer.fingerprint).items():
        view = section.view_of(source)
        # Which caption is drawn is not known here, nor which turns ask by an instruction: what is cut of these is
        # counted while they are read, as the metric cut_tokens.
        room = section.max_text_tokens - sum(templates.overhead_of(view)) if view == "text" else np.iinfo(np.int32).max
        counts = count_texts(texts, view, most=max(0, int(room)))
        doubts += describe_counts(source, counts, most=section.max_text_tokens)
    return doubts


def find_held_out_mismatches(run: TrainConfig, name: str, shards: ShardSet) -> list[str]:
    """Returns a sentence for everything in which a held-out set differs from what the objective trains on."""
    section = _section(run, name)
    place = f"evaluation.sets.{name}"
    if not shards.info.has_pages:
        return [f"{place}: {shards.directory} holds samples without any text; name a set of kind document"]
    try:
        SourceTexts.open(shards.directories, tokenizer_at(section.tokenizer_path, section.normalisation).fingerprint)
    except DataError as error:
        return [f"{place}: {line}" for line in str(error).split("\n")]
    return []


def stored_differences(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Yields a clause for everything that stored weights cannot be used with."""
    before, now = (TextDecoderConfig.model_validate(section["decoder"]) for section in (there, here))
    marks = [section.get("tokenizer_fingerprint") for section in (there, here)]
    if marks[0] != marks[1]:
        yield f"objectives.{name}.tokenizer is another one (fingerprint {marks[0]} there and {marks[1]} here)"
    for field in _IDENTITY:
        old, new = (
            one.key_value_heads if field == "num_key_value_heads" else getattr(one, field) for one in (before, now)
        )
        if old != new:
            yield f"objectives.{name}.decoder.{field} is {old} there and {new} here"
    if now.kind == "opt" and before.max_positions != now.max_positions:
        yield f"objectives.{name}.decoder.max_positions is {before.max_positions} there and {now.max_positions} here"
    for field in ("kind", "num_queries"):
        old, new = (section["bridge"].get(field) for section in (there, here))
        if old != new:
            yield f"objectives.{name}.bridge.{field} is {old} there and {new} here"


def describe(section: Mapping[str, Any]) -> str:
    """Says of a stored section what it learns."""
    decoder, texts = section["decoder"], section["texts"]
    written = " and ".join(dict.fromkeys(texts.values())) if isinstance(texts, Mapping) else texts
    origin = f" from {Path(decoder['path']).name}" if decoder.get("path") else ""
    return (
        f"to write {written} down, by a {decoder['kind']} decoder{origin} of {decoder['num_layers']} layers, "
        f"{decoder['hidden_size']} wide, {decoder['vocab_size']:,} tokens"
    )


def _text_tokens(
    section: TextGenerationConfig, view: TextView, templates: TextTemplates, texts: SourceTexts, rows: np.ndarray
) -> np.ndarray:
    turns = texts.turn_counts()[rows] if view == "turns" else np.ones(len(rows), dtype=np.int32)
    return longest_text(section, texts.lengths(view)[rows], turns, templates.overhead_of(view))


def _known_decoder(section: TextGenerationConfig) -> TextDecoderConfig:
    """Returns the decoder with all sizes, also of a section that is still to be filled in; compares it with its folder
    as long as that is there, which a resumed run does not need."""
    path = section.decoder.path
    if section.decoder.is_known and (path is None or not (Path(path) / "config.json").is_file()):
        return section.decoder
    return TextDecoderConfig.model_validate(decoder_of(section, ())["decoder"])


def _section(run: TrainConfig, name: str) -> TextGenerationConfig:
    section = run.objectives[name]
    assert isinstance(section, TextGenerationConfig)
    return section
