"""`rejects.jsonl`: nothing is lost. A record that cannot be used is written here with its file and the reason.

Appending one line per reject with a flush keeps the file readable after a crash.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType


class RejectsFile:
    """Append-only JSON lines {"stage", "file", "reason"} with counts per stage."""

    def __init__(self, path: str | Path, *, stage: str) -> None:
        """Opens `path` for appending (folders are made); `stage` names the step that rejects, e.g. "ocr"."""
        self.path = Path(path)
        self.stage = stage
        self.count = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("a", encoding="utf-8")

    def add(self, file: str | Path, reason: str) -> None:
        """Records that `file` was not used because of `reason`."""
        line = json.dumps({"stage": self.stage, "file": str(file), "reason": reason}, ensure_ascii=False)
        self._stream.write(line + "\n")
        self._stream.flush()
        self.count += 1

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> RejectsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def count_rejects(path: str | Path) -> dict[str, int]:
    """Returns the number of rejects per stage in `path`; empty when there is no such file."""
    file = Path(path)
    if not file.exists():
        return {}
    with file.open(encoding="utf-8") as stream:
        return dict(Counter(json.loads(line)["stage"] for line in stream if line.strip()))
