"""A user's folder as a list of files, always in the same order, and a stable key for each file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_ove.errors import DataError
from megatron_ove.preprocess.pictures import PICTURE_SUFFIXES

VIDEO_SUFFIXES = (
    ".mp4",
    ".mkv",
    ".mov",
    ".webm",
    ".avi",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".ogv",
    ".wmv",
    ".flv",
    ".3gp",
)


def list_pictures(folder: str | Path) -> list[Path]:
    """Returns the picture files under `folder`, recursively, sorted by their relative path; see `list_files`."""
    return list_files(folder, suffixes=PICTURE_SUFFIXES, kind="picture")


def list_clips(folder: str | Path) -> list[Path]:
    """Returns the video files under `folder`, recursively, sorted by their relative path; see `list_files`."""
    return list_files(folder, suffixes=VIDEO_SUFFIXES, kind="video")


def list_files(folder: str | Path, *, suffixes: Sequence[str], kind: str) -> list[Path]:
    """Returns the files under `folder` whose name ends in one of `suffixes` (any case); hidden ones are skipped.

    Raises:
        DataError: `folder` does not exist, is a file, or holds no such file.
    """
    root = Path(folder)
    if not root.is_dir():
        state = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"the {kind} folder {root} {state}; give the folder that holds your {kind} files")
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent) / name for name in names if name.lower().endswith(tuple(suffixes)) and not name.startswith(".")
        ]
    if not found:
        raise DataError(
            f"the {kind} folder {root} holds no {kind} file, not even in its subfolders (looked for "
            f"{', '.join(suffixes)}); put {kind} files there or give another folder"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def sample_key(path: Path, root: str | Path) -> str:
    """Returns a key for `path` that is unique under `root`, free of dots, and the same wherever `root` lies."""
    relative = path.relative_to(root).as_posix()
    readable = re.sub(r"[^0-9A-Za-z_-]+", "_", relative.rsplit(".", 1)[0])[-40:].strip("_")
    return f"{readable}-{hashlib.sha256(os.fsencode(relative)).hexdigest()[:10]}"
