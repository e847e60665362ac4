"""What `read` and `find` have in common: the objective and its words, how many results, and text for a terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron_ove.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ove.evaluation.words import WordReader

CHECKPOINT_HELP = "checkpoint folder, or a run folder, of which the newest checkpoint is taken"


def add_word_options(parser: argparse.ArgumentParser, *, what: str) -> None:
    """Adds the options; `what` is counted by --top."""
    parser.add_argument("--objective", help="whose words are meant (default: the only one that learned words)")
    parser.add_argument("--vocabulary", help="vocabulary.json of the shard set, for a checkpoint that carries no words")
    parser.add_argument("--top", type=int, default=20, metavar="K", help=f"{what} (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


@contextmanager
def open_reader(arguments: argparse.Namespace) -> Iterator[WordReader]:
    """Gives what the options name."""
    if arguments.top < 1:
        raise ConfigError(f"--top {arguments.top} shows nothing; give at least 1")

    from megatron_ove.evaluation.words import load_word_reader
    from megatron_ove.parallel.topology import destroy_topology

    try:
        yield load_word_reader(
            arguments.checkpoint, objective=arguments.objective, vocabulary=arguments.vocabulary or None
        )
    finally:
        destroy_topology()


def write_json(value: Any) -> None:
    """Prints a value as JSON."""
    _write(json.dumps(value, indent=1, ensure_ascii=False))


def write_line(text: str) -> None:
    """Prints a line of text; characters that would steer a terminal as escapes."""
    _write("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _write(text: str) -> None:
    """Characters that the terminal's encoding lacks are printed as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
