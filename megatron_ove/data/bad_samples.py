"""Samples that could not be read in training: what is done with them, and the record of it.

At 13 billion samples some will be unreadable. Such a sample keeps its place in its microbatch, so that no size changes:
its patches and positions become zeros and its labels -1, on every rank that shares it. It is written to the run folder
before its step has any effect. A run that resumes treats recorded samples as bad in the same steps again, even if they
can be read by now, and so stays equal to a run that was never interrupted.

Each replica writes a file of its own, `rejects/replica_00000.jsonl`, since appending from several machines to one file
of a network disk loses lines; most replicas write none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ove.errors import DataError
from megatron_ove.rejects import append_lines, printable

FOLDER_NAME = "rejects"
_LINE_START = b'{"step": '


@dataclass(frozen=True)
class BadSample:
    """One sample in one step.

    Attributes:
        step: number of the step as in metrics.jsonl; the first one is 1.
        source: name of its source.
        ordinal: how many samples of the source came before it in the run; with the source this identifies the draw.
        row: in the source's index.
        key: its key.
        reason: a sentence with its shard.
    """

    step: int
    source: str
    ordinal: int
    row: int
    key: str
    reason: str


KnownBad = Mapping[int, frozenset[tuple[str, int]]]
"""Step, counted from 0 -> (source, ordinal) of its recorded bad samples."""


def known_bad(samples: Iterable[BadSample], *, start_step: int) -> KnownBad:
    """Returns what a run that goes on with `start_step`, counted from 0, must treat as bad again."""
    steps: dict[int, set[tuple[str, int]]] = {}
    for sample in samples:
        if sample.step > start_step:
            steps.setdefault(sample.step - 1, set()).add((sample.source, sample.ordinal))
    return {step: frozenset(places) for step, places in steps.items()}


def record_bad_samples(run_dir: str | Path, replica: int, samples: Iterable[BadSample]) -> Path:
    """Appends to a replica's file and forces it to disk; returns the file.

    Raises:
        DataError: it cannot be written, so that a resumed run would not be the same run.
    """
    path = Path(run_dir) / FOLDER_NAME / f"replica_{replica:05d}.jsonl"
    lines = [
        json.dumps(asdict(sample) | {"reason": printable(sample.reason)}, ensure_ascii=False) for sample in samples
    ]
    try:
        append_lines(path, lines)
    except OSError as error:
        raise DataError(
            f"{path}, which names the samples that could not be read, cannot be written ({error.strerror}), so the run "
            "could not be repeated; free some space or check the permissions, then start the same command again"
        ) from error
    return path


def read_bad_samples(run_dir: str | Path) -> Iterator[BadSample]:
    """Yields all records of a run, file by file and line by line; one that a kill cut off is left out.

    Raises:
        DataError: a file holds something else, or cannot be read.
    """
    for path in sorted((Path(run_dir) / FOLDER_NAME).glob("replica_*.jsonl")):
        try:
            with path.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    sample = _parse(line, number, path)
                    if sample is not None:
                        yield sample
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}), so the run could not be repeated; check the disk"
            ) from error


def _parse(line: bytes, number: int, path: Path) -> BadSample | None:
    """Returns the record of a line; None for one that a kill or a full disk cut off."""
    try:
        return BadSample(**json.loads(line))
    except (ValueError, TypeError) as error:
        start = line.strip()[: len(_LINE_START)]
        if isinstance(error, ValueError) and _LINE_START.startswith(start):
            return None
        raise DataError(
            f"line {number} of {path} is no record of a bad sample, so the file was written by something else; move it "
            "out of the folder"
        ) from error
