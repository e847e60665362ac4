"""The command line: `megatron-ove SUBCOMMAND ...`.

A sub-command is a module here with `add_parser(subparsers)`, which sets `run`, a function from the parsed arguments to
the exit status. Heavy packages are imported inside `run`, so that --help and a wrong configuration answer at once.
Errors of the user are printed as their sentence, with status 2; everything else keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

from megatron_ove import __version__
from megatron_ove.errors import ConfigError, MegatronOveError, file_system_sentence
from megatron_ove.parallel.launcher import slurm_rank_variables

_REPEAT_DELAY_S = 4.0

SUBCOMMANDS = ("train", "plan", "convert", "evaluate", "read", "find", "inspect", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns the exit status: 0 done, 1 failed, 2 the user has to change something."""
    parsed = build_parser().parse_args(arguments)
    rank, world_size = 0, 1
    try:
        os.environ.update(slurm_rank_variables(os.environ, has_terminal=os.isatty(0)))
        rank, world_size = _read_place()
        set_up_logging(rank, verbose=parsed.verbose)
        return parsed.run(parsed)
    except MegatronOveError as error:
        _print_sentence(error, rank, world_size)
        return _leave(2, world_size)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left, e.g. `| head`
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("megatron-ove: interrupted\n")
        return _leave(130, world_size)
    except Exception as error:
        sentence = file_system_sentence(error) if isinstance(error, OSError) else None
        if sentence is not None:
            logging.getLogger(__name__).debug("the error was", exc_info=True)  # shown with --verbose
            _print_sentence(MegatronOveError(sentence), rank, world_size)
            return _leave(2, world_size)
        if world_size == 1:
            raise
        _describe_failure(error, rank, world_size)
        return _leave(1, world_size)


def _read_place() -> tuple[int, int]:
    """Returns (rank, world size); (0, 1) where no launcher has set them."""
    rank, world_size, _ = _read_number("RANK", 0), _read_number("WORLD_SIZE", 1), _read_number("LOCAL_RANK", 0)
    if "WORLD_SIZE" in os.environ:
        _read_number("MASTER_PORT", 0)
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys() and rank >= world_size:
        raise ConfigError(
            f"the environment has RANK = {rank} and WORLD_SIZE = {world_size}, but ranks are counted from 0 to "
            "WORLD_SIZE - 1, so the others would wait for ever; start with torchrun, or unset both to run one process"
        )
    return rank, world_size


def _read_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"the environment has {name} = '{text}', which is no number, so this process cannot know its place; "
            "start it with torchrun, or unset the variable"
        )
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with every sub-command."""
    parser = argparse.ArgumentParser(prog="megatron-ove", description="Trains OCR-aware vision encoders.")
    parser.add_argument("--version", action="version", version=f"megatron-ove {__version__}")
    parser.add_argument("--verbose", action="store_true", help="show debug messages on rank 0")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name in SUBCOMMANDS:
        importlib.import_module(f"megatron_ove.cli.{name}").add_parser(subparsers)
    return parser


class _StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is now, so that a live progress line can redirect it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass


def set_up_logging(rank: int, *, verbose: bool) -> None:
    """Messages on standard error: rank 0 from INFO on, other ranks warnings with their number. Called once."""
    level = logging.WARNING if rank else logging.DEBUG if verbose else logging.INFO
    handler = _StandardErrorHandler()
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {_prefix(rank, 2) if rank else ''}%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("megatron_ove").setLevel(logging.DEBUG if rank == 0 else logging.WARNING)
    if not verbose:
        # torch's own warnings surface in the CPU backend, through which its calls pass.
        warnings.filterwarnings("ignore", module=r"(megatron\.core|torch|megatron_ove\.parallel\.cpu_backend)\b")
        logging.getLogger("megatron").setLevel(logging.ERROR)


def _prefix(rank: int, world_size: int) -> str:
    return f"[rank {rank}] " if world_size > 1 else ""


def _print_sentence(error: MegatronOveError, rank: int, world_size: int) -> None:
    """Prints a user's error once on every machine, or on the only rank that has it.

    Not on rank 0 alone: what all ranks of a machine have alike (a missing file) another machine may not have.
    """
    if error.on_every_rank and os.environ.get("LOCAL_RANK", str(rank)) != "0":
        time.sleep(_REPEAT_DELAY_S)  # whoever ends first has its launcher end the others, who may not have spoken yet
        return
    if rank:
        # Most errors happen on all ranks alike. Rank 0 then ends first, and its launcher ends us before we repeat it.
        time.sleep(_REPEAT_DELAY_S)
    sys.stderr.write(f"megatron-ove: {_prefix(rank, world_size)}{error}\n")


def _describe_failure(error: Exception, rank: int, world_size: int) -> None:
    """Prints the traceback, or one line where the cause is only that another rank has gone."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "Read error", "Broken pipe")
    if any(sign in text for sign in signs):
        sys.stderr.write(f"megatron-ove: {_prefix(rank, world_size)}stopped, because another rank has gone\n")
    else:
        sys.stderr.write(f"megatron-ove: {_prefix(rank, world_size)}failed:\n{traceback.format_exc()}")


def _leave(status: int, world_size: int) -> int:
    """Ends the process at once when there are other ranks: a tidy end would wait for them, and they for us."""
    if world_size > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
