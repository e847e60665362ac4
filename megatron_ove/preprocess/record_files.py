"""Files between the steps of a pipeline: JSON lines that survive a kill, whole-file writes, and re-judged rejects."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.input_files import InputFile, real_path, state_of
from megatron_ove.preprocess.sole_writer import sole_writer
from megatron_ove.rejects import RejectsFile, printable, read_rejects
from megatron_ove.whole_file import write_whole

_STAT_THREADS, _STAT_PART = 32, 256


def read_records(
    path: str | Path, *, made_by: str, fields: Sequence[str] = (), may_be_cut: bool = False
) -> list[dict[str, Any]]:
    """Reads a JSON-lines file.

    Args:
        path: the file.
        made_by: the script that makes such files, for the error sentence.
        fields: what every record must have.
        may_be_cut: whether one of our scripts wrote it, so that a broken last line without an end is a write that a
            kill cut off, and is left out. In a file of a user's it is a mistake like any other.

    Raises:
        DataError: no such file, a broken line, or a `file` that no file can be called.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file} {'is no file' if file.exists() else 'does not exist'}; make it with {made_by}")
    content = file.read_bytes()
    may_be_cut = may_be_cut and not content.endswith(b"\n")
    lines = [line for line in content.split(b"\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter of what is nested without end
            if may_be_cut and number == len(lines) and line.startswith(b"{"):
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
        problem = _wrong_field(record, fields)
        if problem:
            raise DataError(f"line {number} of {file} {problem}; correct it, or make the file again with {made_by}")
        records.append(record)
    return records


def _wrong_field(record: Mapping[str, Any], fields: Sequence[str]) -> str | None:
    """Returns what is wrong with the fields that say which input a record is of, as the end of a sentence, or None."""
    name = record.get("file") if "file" in fields else None
    if isinstance(name, str) and ("\0" in name or printable(name) != name):
        return f"has the file {name!r}, but no file can be called so"
    if "file_state" in fields:  # of our own files; a table of a user's is judged by who reads it
        if not isinstance(record["file"], str) or not isinstance(record["key"], str):
            return f"has the key {record['key']!r} and the file {record['file']!r}, which are no names"
        if not is_file_state(record["file_state"]):
            return f"has the file_state {record['file_state']!r}, which is not [bytes, modification time in ns]"
    return None


def is_file_state(value: object) -> bool:
    """Whether `value` is what `file_state` returns."""
    return isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)


@dataclass(frozen=True)
class Continuation:
    """What is left to do of a folder when earlier records are continued.

    Attributes:
        elsewhere: earlier records of none of the inputs, which stay.
        kept: earlier records of inputs that are unchanged.
        todo: inputs without a current record, with keys that no other record has.
        num_gone_sheets: earlier records that are dropped: their file is there, but with fewer sheets.
    """

    elsewhere: list[Mapping[str, Any]]
    kept: list[Mapping[str, Any]]
    todo: list[InputFile]
    num_gone_sheets: int = 0

    def counts(self, num_new: int) -> str:
        """Says how many are new, were kept, are of elsewhere, and were dropped."""
        parts = [f"{num_new} new", f"{len(self.kept)} kept"]
        parts += [f"{len(self.elsewhere)} of elsewhere kept"] if self.elsewhere else []
        parts += [f"{self.num_gone_sheets} dropped of sheets that are gone"] if self.num_gone_sheets else []
        return ", ".join(parts)


def continue_records(earlier: Iterable[Mapping[str, Any]], inputs: Sequence[InputFile]) -> Continuation:
    """Compares the inputs with earlier records, so that finished work of this and of any other folder stays.

    An input is the same by whatever path its folder is found; it keeps its key. A file that has changed since is done
    again. Among hundreds of millions of files nothing may ask a file server once for each: listed inputs have their
    state, records have real paths as a rule, and of other paths each folder is resolved once.

    Args:
        earlier: records with `key`, `file`, `file_state`, and `sheet` if it is not the first.
        inputs: what the folder holds now.
    """
    here = {item.identity for item in inputs}
    files = {file for file, _ in here}
    known: dict[tuple[str, int], Mapping[str, Any]] = {}
    real_folders: dict[str, str] = {}
    for record in earlier:
        file = record["file"] if record["file"] in files else _in_real_folder(record["file"], real_folders)
        known[file, record.get("sheet", 0)] = record
    keys = {record["key"] for record in known.values()}
    elsewhere = [record for (file, _), record in known.items() if file not in files]
    num_gone_sheets = sum(file in files and (file, sheet) not in here for file, sheet in known)
    kept, todo = [], []
    for item in inputs:
        record = known.get(item.identity)
        if record is not None and record["file_state"] == _state(item):
            kept.append(record)
        elif record is not None:
            todo.append(replace(item, key=record["key"]))
        else:
            todo.append(replace(item, key=_free_key(item.key, keys)))
            keys.add(todo[-1].key)
    return Continuation(elsewhere, kept, todo, num_gone_sheets)


def _in_real_folder(file: str, real_folders: dict[str, str]) -> str:
    """Returns the path with links of its folder followed; what is found out is added to `real_folders`."""
    folder, name = os.path.split(file)
    if folder not in real_folders:
        real_folders[folder] = str(real_path(Path(folder)))
    return str(Path(real_folders[folder], name))


def _state(item: InputFile) -> list[int]:
    return file_state(item.path) if item.state is None else item.state


def as_record(item: InputFile) -> dict[str, Any]:
    """Returns the part of a record that says which input it is of, and its state before it was read."""
    sheet = {"sheet": item.sheet} if item.sheet else {}
    link_name = {"link_name": item.link_name} if item.link_name else {}
    return {"key": item.key, "file": str(item.path), **sheet, **link_name, "file_state": _state(item)}


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


def stale_reasons(looked_at: Sequence[tuple[str, Sequence[int] | None]], step: str) -> list[str | None]:
    """Returns the `stale_reason` of each (path, state then), for many files at once; None also for an unknown state."""

    def of_part(start: int) -> list[str | None]:
        part = looked_at[start : start + _STAT_PART]
        return [None if state is None else stale_reason(file, state, step) for file, state in part]

    with ThreadPoolExecutor(_STAT_THREADS) as pool:  # they wait for the file server, not for a processor
        return list(chain.from_iterable(pool.map(of_part, range(0, len(looked_at), _STAT_PART))))


def current_rows(
    looked_at: Sequence[tuple[str, Sequence[int] | None]], *, what: str, step: str
) -> tuple[list[int], str]:
    """Tells which inputs may be used with what was found in them earlier (see `stale_reason`).

    Args:
        looked_at: (path, `file_state` then) of each; None where that is not known, which is believed.
        what: their name in the sentence, e.g. "pages".
        step: the script that looked at them.

    Returns:
        Their places, and a sentence on how many are left out; "" if none is.

    Raises:
        DataError: none may be used.
    """
    reasons = stale_reasons(looked_at, step)
    rows = [row for row, reason in enumerate(reasons) if reason is None]
    if len(rows) == len(reasons):
        return rows, ""
    first = next(filter(None, reasons))
    if not rows:
        raise DataError(f"none of the {len(reasons)} {what} is as it was when it was looked at; the first: {first}")
    return rows, f"{len(reasons) - len(rows)} of {len(reasons)} {what} are left out; the first: {first}"


def _free_key(key: str, taken: Collection[str]) -> str:
    """Returns `key`, or with a number if a file of the same name in another folder has it."""
    if key not in taken:
        return key
    return next(free for number in count(2) if (free := f"{key}-{number}") not in taken)


def require_same_settings(
    earlier: Sequence[Mapping[str, Any]], field: str, settings: Mapping[str, Any], path: Path
) -> None:
    """Refuses to continue records that were made with other settings: they would not match, or be lost.

    Raises:
        DataError: naming the settings that differ.
    """
    for record in earlier:
        before = record[field] if isinstance(record[field], Mapping) else {}
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


def file_state(path: Path) -> list[int]:
    """Returns the `state_of` the file as it is now."""
    try:
        return state_of(path.stat())
    except OSError:
        return state_of(None)


@contextmanager
def open_rejects(path: str | Path, *, stage: str, files: Collection[object]) -> Iterator[RejectsFile]:
    """Opens a rejects file for a stage that judges `files` (again): their earlier lines of this stage are taken out.

    What lies inside a file that is judged, such as `a.tar/key.jpg`, is judged with it.

    Raises:
        DataError: the file holds something else, or another run writes to it.
    """
    target = Path(path)
    judged = {printable(str(file)) for file in files}
    with sole_writer(target):
        records = read_rejects(target)
        kept = [record for record in records if record["stage"] != stage or not _is_judged(record["file"], judged)]
        if len(kept) < len(records):
            write_records(target, kept)
        with RejectsFile(target, stage=stage) as rejects:
            yield rejects


def _is_judged(file: str, judged: Collection[str]) -> bool:
    return file in judged or any(str(parent) in judged for parent in PurePath(file).parents)
