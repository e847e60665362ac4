"""Files between the steps of a pipeline: JSON lines that survive a kill, whole-file writes, and re-judged rejects."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.input_files import InputFile, real_path
from megatron_ove.rejects import RejectsFile, printable, read_rejects


def read_records(path: str | Path, *, made_by: str, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Reads a JSON-lines file; a last line that a kill cut off is left out.

    Args:
        path: the file.
        made_by: the script that makes such files, for the error sentence.
        fields: what every record must have.

    Raises:
        DataError: no such file, or a broken line that is not the last.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file} does not exist; make it with {made_by}")
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) and line.startswith(b"{"):  # cut off by a kill
                break
            raise DataError(
                f"line {number} of {file} is not JSON ({error}); make the file again with {made_by}"
            ) from error
        missing = [name for name in fields if not isinstance(record, dict) or name not in record]
        if missing:
            raise DataError(
                f"line {number} of {file} has no {', '.join(missing)}, so the file is something else; give a file made "
                f"with {made_by}"
            )
        records.append(record)
    return records


@dataclass(frozen=True)
class Continuation:
    """What is left to do of a folder when earlier records are continued.

    Attributes:
        elsewhere: earlier records of none of the inputs, which stay.
        kept: earlier records of inputs that are unchanged.
        todo: inputs without a current record, with keys that no other record has.
    """

    elsewhere: list[Mapping[str, Any]]
    kept: list[Mapping[str, Any]]
    todo: list[InputFile]

    def counts(self, num_new: int) -> str:
        """Says how many are new, were kept, and are of elsewhere."""
        parts = [f"{num_new} new", f"{len(self.kept)} kept"]
        return ", ".join(parts + ([f"{len(self.elsewhere)} of elsewhere kept"] if self.elsewhere else []))


def continue_records(earlier: Iterable[Mapping[str, Any]], inputs: Sequence[InputFile]) -> Continuation:
    """Compares the inputs with earlier records, so that finished work of this and of any other folder stays.

    An input is the same by whatever path it is found; it keeps its key. A file that has changed since is done again.

    Args:
        earlier: records with `key`, `file`, `file_state`, and `sheet` if it is not the first.
        inputs: what the folder holds now.
    """
    known: dict[tuple[str, int], Mapping[str, Any]] = {}
    for record in earlier:
        known[str(real_path(Path(record["file"]))), record.get("sheet", 0)] = record
    keys = {record["key"] for record in known.values()}
    here = {item.identity for item in inputs}
    elsewhere = [record for identity, record in known.items() if identity not in here]
    kept, todo = [], []
    for item in inputs:
        record = known.get(item.identity)
        if record is not None and record["file_state"] == file_state(item.path):
            kept.append(record)
        elif record is not None:
            todo.append(replace(item, key=record["key"]))
        else:
            todo.append(replace(item, key=_free_key(item.key, keys)))
            keys.add(todo[-1].key)
    return Continuation(elsewhere, kept, todo)


def as_record(item: InputFile, state: Sequence[int]) -> dict[str, Any]:
    """Returns the part of a record that says which input it is of; `state` as it was before the input was read."""
    sheet = {"sheet": item.sheet} if item.sheet else {}
    link_name = {"link_name": item.link_name} if item.link_name else {}
    return {"key": item.key, "file": str(item.path), **sheet, **link_name, "file_state": list(state)}


def input_of(record: Mapping[str, Any]) -> InputFile:
    """Returns the input that a record is of, which has what `as_record` gives."""
    file = record["file"]
    return InputFile(Path(file), record.get("link_name", file), record["key"], record.get("sheet", 0))


def stale_reason(file: str, state: Sequence[int], step: str) -> str | None:
    """Returns why an input must not be used with what was found in it earlier, or None.

    Args:
        file: its path.
        state: its `file_state` then.
        step: the script that looked at it, which has to be run again.
    """
    now = file_state(Path(file))
    if now == list(state):
        return None
    if now == [-1, -1]:
        return f"{file} is not there any more; put it back, or run {step} again"
    return f"{file} has changed since {step} looked at it, so what was found may not be in it; run that step again"


def _free_key(key: str, taken: Collection[str]) -> str:
    """Returns `key`, or with a number if a file of the same name in another folder has it."""
    if key not in taken:
        return key
    return next(free for number in itertools.count(2) if (free := f"{key}-{number}") not in taken)


def require_same_settings(
    earlier: Sequence[Mapping[str, Any]], field: str, settings: Mapping[str, Any], path: Path
) -> None:
    """Refuses to continue records that were made with other settings: they would not match, or be lost.

    Raises:
        DataError: naming the settings that differ.
    """
    for record in earlier:
        before = record[field]
        if before != settings:
            names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
            differences = "; ".join(f"{name} {before.get(name)} there, {settings.get(name)} now" for name in names)
            raise DataError(
                f"{path} holds results for {len(earlier)} files, made with other settings ({differences}), which "
                "do not go together with new ones; use those settings, or write to another place"
            )


class RecordFile:
    """A JSON-lines file that is continued: records of unchanged inputs are kept, others are made anew."""

    def __init__(self, path: str | Path, keep: Iterable[Mapping[str, Any]]) -> None:
        """Starts the file with the records to keep, in one rename, and appends to it."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_records(self.path, keep)
        self._stream = self.path.open("a", encoding="utf-8")

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it is on disk when this returns."""
        self._stream.write(_line(record))
        self._stream.flush()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON-lines file in one rename."""
    write_whole(path, "".join(map(_line, records)).encode())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(content)
    partial.replace(path)


def file_state(path: Path) -> list[int]:
    """Returns [size in bytes, modification time in ns]: equal states mean that a file need not be done again.

    A file that is not there (a link to nothing) gets [-1, -1]; whoever reads it gives the reason.
    """
    try:
        status = path.stat()
    except OSError:
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def open_rejects(path: str | Path, *, stage: str, files: Collection[object]) -> RejectsFile:
    """Opens a rejects file for a stage that judges `files` (again): their earlier lines of this stage are taken out."""
    target = Path(path)
    judged = {printable(str(file)) for file in files}
    records = read_rejects(target)
    kept = [record for record in records if record["stage"] != stage or record["file"] not in judged]
    if len(kept) < len(records):
        write_records(target, kept)
    return RejectsFile(target, stage=stage)
