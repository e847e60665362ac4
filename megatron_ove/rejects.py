"""`rejects.jsonl`: nothing is lost. A record that cannot be used is written here with its file and the reason.

Appending one line per reject with a flush keeps the file readable after a crash.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from megatron_ove.errors import DataError


class RejectsFile:
    """Append-only JSON lines {"stage", "file", "reason"}; `count` and `first_reason` are of what was added here."""

    def __init__(self, path: str | Path, *, stage: str) -> None:
        """Opens `path` for appending (folders are made); `stage` names the step that rejects, e.g. "ocr"."""
        self.path = Path(path)
        self.stage = stage
        self.count = 0
        self.first_reason = ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_cut_off = self.path.is_file() and not _ends_with_newline(self.path)
        self._stream = self.path.open("a", encoding="utf-8")
        if is_cut_off:  # by a kill: the next record must not be glued to it
            self._stream.write("\n")

    def add(self, file: object, reason: str) -> None:
        """Records that `file`, a path or what has one as its text, was not used because of `reason`."""
        record = {"stage": self.stage, "file": printable(str(file)), "reason": printable(reason)}
        line = json.dumps(record, ensure_ascii=False)
        self._stream.write(line + "\n")
        self._stream.flush()
        self.count += 1
        self.first_reason = self.first_reason or record["reason"]

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> RejectsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Appends lines to a file and forces them to disk; folders are made, and a last line that a kill cut off is ended.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_cut_off = path.is_file() and not _ends_with_newline(path)
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n" * is_cut_off + "".join(f"{line}\n" for line in lines))
        stream.flush()
        os.fsync(stream.fileno())


def printable(text: str) -> str:
    """Returns `text` with what no UTF-8 file can hold (bytes of a file name that are not UTF-8) as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_rejects(path: str | Path) -> list[dict[str, str]]:
    """Returns the records of a rejects file; a line that a kill cut off is left out. Empty without such a file.

    Raises:
        DataError: the file holds something else.
    """
    file = Path(path)
    if not file.exists():
        return []
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({key: str(record[key]) for key in ("stage", "file", "reason")})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if line.startswith(b'{"stage": '):
                continue
            raise DataError(
                f"line {number} of {file} is no record of a rejected file, so the file is something else; give another "
                "name for the rejects"
            ) from error
    return records


def count_rejects(path: str | Path) -> dict[str, int]:
    """Returns the number of rejects per stage in `path`; empty when there is no such file. Raises as `read_rejects`."""
    return dict(Counter(record["stage"] for record in read_rejects(path)))


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 1))
        return size == 0 or stream.read(1) == b"\n"
