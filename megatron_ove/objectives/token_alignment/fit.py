"""Do table, tokenizer and shard sets fit a section of kind token_alignment?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_ove.config.token_alignment import TokenAlignmentConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.convert.token_table import token_table_fingerprint, token_table_shape
from megatron_ove.errors import CheckpointError, DataError
from megatron_ove.objectives.regions.region_fit import no_boxes
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.token_cache import TextTokenizer


def table_of(section: TokenAlignmentConfig, infos: Sequence[Any]) -> Mapping[str, Any]:
    """Returns the table with its width, and the tokenizer's mark.

    Raises:
        CheckpointError, DataError: the folder or the tokenizer cannot be used, or another width is given.
    """
    del infos
    tokenizer = TextTokenizer(section.tokenizer_path)
    if section.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise DataError(
            f"{tokenizer.path} is another tokenizer than tokenizer_fingerprint = {section.tokenizer_fingerprint} says; "
            "put the right one there, or leave the fingerprint out of a new run"
        )
    table = section.table
    if table.path is not None:
        _, width = token_table_shape(table.path)
        if table.width not in (None, width):
            raise DataError(
                f"table.width = {table.width}, but the rows of {table.path} have {width} channels; leave the width out"
            )
        fingerprint = token_table_fingerprint(table.path)
        if table.fingerprint not in (None, fingerprint):
            raise DataError(
                f"the rows of {table.path} are others than the run began with (fingerprint {fingerprint}, not "
                f"{table.fingerprint}); put the right folder there, or begin a new run"
            )
        table = table.model_copy(update={"width": width, "fingerprint": fingerprint})
    return {"table": table.model_dump(), "tokenizer_fingerprint": tokenizer.fingerprint}


def find_mismatches(run: TrainConfig, name: str, sets: Mapping[str, ShardSet]) -> list[str]:
    """Returns a sentence for everything that could not be learned."""
    section = _section(run, name)
    problems = [sentence for source, shards in sets.items() for sentence in no_boxes(name, source, shards)]
    try:
        tokenizer = TextTokenizer(section.tokenizer_path)
        if section.table.path is not None:
            rows, _ = token_table_shape(section.table.path)
            if rows < tokenizer.vocab_size:
                problems.append(
                    f"objectives.{name}: {tokenizer.path} has {tokenizer.vocab_size} tokens, more than the {rows} rows "
                    f"of {section.table.path}; use the language model's own tokenizer"
                )
    except (CheckpointError, DataError) as error:
        problems.append(f"objectives.{name}: {error}")
    return problems


def find_held_out_mismatches(run: TrainConfig, name: str, shards: ShardSet) -> list[str]:
    """Returns a sentence for everything in which a held-out set differs from what is trained on."""
    sentences = no_boxes(name, run.objectives[name].sources[0], shards)
    return [f"evaluation.sets.{name}: {sentence}" for sentence in sentences]


def stored_differences(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Yields a clause for everything that stored weights cannot be used with."""
    for field in ("tokenizer_fingerprint", "upsample"):
        if there.get(field) != here.get(field):
            yield f"objectives.{name}.{field} is {there.get(field)} there and {here.get(field)} here"
    for field in ("width", "fingerprint"):
        before, now = there["table"].get(field), here["table"].get(field)
        if before != now:
            yield f"objectives.{name}.table.{field} is {before} there and {now} here"


def describe(section: Mapping[str, Any]) -> str:
    """Says of a stored section what it learns."""
    table = section["table"]
    origin = table["path"] or "a random table"
    return f"to carry the embedding of each {section['unit']} in its pixels, {table['width']} wide, of {origin}"


def _section(run: TrainConfig, name: str) -> TokenAlignmentConfig:
    section = run.objectives[name]
    assert isinstance(section, TokenAlignmentConfig)
    return section
