"""One picture or clip of a user's, as all tools hand it on: where it is, its key, and which sheet of a file it is."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class InputFile:
    """One input of a tool.

    Attributes:
        path: absolute, with links followed, so that a file is the same by whatever path it was given.
        name: path below the folder it was found in, with "/".
        key: names its sample; unique, free of dots.
        sheet: 0 for the first or only picture of the file, 1 for the second page of a TIFF, and so on.
        state: the file's `state_of` when its folder was looked through; None if it was found otherwise.
    """

    path: Path
    name: str
    key: str
    sheet: int = 0
    state: list[int] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.path} (sheet {self.sheet + 1})" if self.sheet else str(self.path)

    @property
    def suffix(self) -> str:
        """Of the name, in lower case: a link `a.tga` says more than the file it leads to, as a cache's `blobs/1f0e`."""
        return Path(self.name).suffix.lower()

    @property
    def link_name(self) -> str:
        """The name without folders if its suffix is not the file's own; else "", as the path says everything."""
        return Path(self.name).name if self.suffix != self.path.suffix.lower() else ""

    @property
    def identity(self) -> tuple[str, int]:
        """What tells inputs apart, whatever folder they were found through."""
        return str(self.path), self.sheet


def sample_key(name: str, sheet: int = 0) -> str:
    """Returns a key for the file `name`, a path below its folder: unique there, without dots, the same everywhere."""
    readable = re.sub(r"[^0-9A-Za-z_-]+", "_", name.rsplit(".", 1)[0])[-40:].strip("_")
    return f"{readable}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}" + (f"-s{sheet + 1}" if sheet else "")


def state_of(status: os.stat_result | None) -> list[int]:
    """Returns [size in bytes, modification time in ns]: equal states mean that a file need not be done again.

    A file that is not there (None: a link to nothing) gets [-1, -1]; whoever reads it gives the reason.
    """
    return [-1, -1] if status is None else [status.st_size, status.st_mtime_ns]


def real_path(path: Path) -> Path:
    """Returns the absolute path with links followed; of a link to nothing or in a circle, the link's own."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):
        return path.parent.resolve() / path.name
