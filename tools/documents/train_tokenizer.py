"""Trains a byte-level BPE tokenizer on the texts of document sets, for a text decoder that starts from nothing.

Every text can be written with it: what is no token of its own is spelled in bytes. With --vocab-size 257 it knows
bytes alone, so a decoder spells, which is what small ones generalise by. The folder has the files that HuggingFace's
AutoTokenizer reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_ove.errors import DataError
from megatron_ove.new_folder import new_folder
from megatron_ove.preprocess.file_runs import show_progress
from megatron_ove.preprocess.tool_arguments import report, run_tool, whole_number
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.token_cache import cached_texts

END_TOKEN = "<|endoftext|>"
_FEWEST = 257
"""All bytes, and the end token."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", help="document sets")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the tokenizer")
    parser.add_argument(
        "--vocab-size", type=whole_number(_FEWEST), default=8192, help="tokens, 257 or more (default: %(default)s)"
    )
    parser.add_argument(
        "--max-samples",
        type=whole_number(1),
        default=1_000_000,
        help="most documents of a set that are read, spread evenly over it (default: %(default)s)",
    )
    return parser


def _texts(directory: Path, most: int) -> Iterator[str]:
    shards = ShardSet.open(directory)
    if not shards.info.has_pages:
        raise DataError(f"{directory} holds samples of kind {shards.info.kind}, which have no text; name document sets")
    count = min(len(shards), most)
    rows = [i * len(shards) // count for i in range(count)]
    for row in show_progress(rows, title=f"reading texts of {directory.name}"):
        yield from (text for _, _, text in cached_texts(shards.read_document(row)) if text)


def _work(arguments: argparse.Namespace) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for one in arguments.directories for text in _texts(one, arguments.max_samples))
    with new_folder(arguments.output) as folder:
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_TOKEN}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    found = tokenizer.get_vocab_size()
    few = (
        f" (fewer than {arguments.vocab_size:,}: the texts have no more pairs)" if found < arguments.vocab_size else ""
    )
    report(f"{found:,} tokens{few} -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
