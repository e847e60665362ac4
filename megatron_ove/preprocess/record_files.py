"""Files between the steps of a pipeline: JSON lines that survive a kill, whole-file writes, and re-judged rejects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_ove.errors import DataError
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


class RecordFile:
    """A JSON-lines file that is continued: records of unchanged inputs are kept, others are made anew."""

    def __init__(self, path: str | Path, keep: Iterable[Mapping[str, Any]]) -> None:
        """Starts the file with the records to keep, in one rename, and appends to it."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, "".join(_line(record) for record in keep).encode())
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


def open_rejects(path: str | Path, *, stage: str, files: Collection[str | Path]) -> RejectsFile:
    """Opens a rejects file for a stage that judges `files` (again): their earlier lines of this stage are taken out."""
    target = Path(path)
    judged = {printable(str(file)) for file in files}
    records = read_rejects(target)
    kept = [record for record in records if record["stage"] != stage or record["file"] not in judged]
    if len(kept) < len(records):
        write_whole(target, "".join(map(_line, kept)).encode())
    return RejectsFile(target, stage=stage)


@contextmanager
def replacement_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields the path to write a new folder to; with `overwrite` it takes the place of `target` once it is whole.

    Without `overwrite` the path is `target` itself, and the writer refuses an existing folder.
    """
    if not overwrite:
        yield target
        return
    new, old = (target.with_name(f"{target.name}.{suffix}") for suffix in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    yield new
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
