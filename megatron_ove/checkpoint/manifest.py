"""`manifest.json`: the list of a checkpoint's files with size and checksum, written last.

A checkpoint is complete when its folder has its final name, a manifest, and every file of the manifest with the size
given there. It is intact when the checksums agree as well. CRC-32 is used: it always finds a single flipped bit and
runs faster than disks deliver.

A checkpoint may be a link to a folder elsewhere, e.g. on a slower disk: it is read like any other, and neither it nor
what it points to is ever deleted.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
PARTIAL_SUFFIX = ".tmp"
DISCARDED_SUFFIX = ".discarded"

_READ_BYTES = 4 << 20
_FOLDER = re.compile(r"^step_(\d{8,})(\.tmp)?$")
_DISCARDED = re.compile(r"^step_\d{8,}.*\.discarded\d*$")


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a checkpoint, e.g. step_00000100."""
    return f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Returns (step, folder) of everything that looks like a checkpoint, unfinished ones included, newest first."""
    if not directory.is_dir():
        return []
    found = [(match, path) for path in directory.iterdir() if (match := _FOLDER.match(path.name)) and path.is_dir()]
    # At equal steps the finished folder comes before its unfinished successor.
    found.sort(key=lambda item: (-int(item[0].group(1)), item[0].group(2) or ""))
    return [(int(match.group(1)), path) for match, path in found]


def checkpoints_at(path: Path) -> list[Path]:
    """Returns what a path means: a checkpoint; or the checkpoints, newest first, of a run or of its `checkpoints`
    folder, unfinished ones included."""
    runs_folder = path / "checkpoints"
    found = list_checkpoints(path) or list_checkpoints(runs_folder)
    return [folder for _, folder in found] if found or runs_folder.is_dir() else [path]


def list_discarded(directory: Path) -> list[Path]:
    """Returns the folders that `discard` could not delete so far."""
    return sorted(path for path in directory.iterdir() if _DISCARDED.match(path.name))


def discard(directory: Path) -> None:
    """Deletes a checkpoint folder, finished or not; leaves links and what they point to alone.

    It first loses its manifest and then its name, so that whatever happens nobody takes the rest for a checkpoint. What
    cannot be deleted, e.g. because somebody reads it over NFS, stays as `step_XXXXXXXX.discarded` for another attempt.

    Raises:
        OSError: something of it is still there.
    """
    if directory.is_symlink():
        return
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    path = set_aside(directory)
    shutil.rmtree(path, ignore_errors=True)  # as much as can be
    if path.exists():
        shutil.rmtree(path)  # says what is in the way


def set_aside(directory: Path) -> Path:
    """Renames a checkpoint folder, or the link that stands for one, to a free name that nobody takes for a checkpoint;
    returns its new path."""
    if _DISCARDED.match(directory.name):
        return directory
    name = directory.name + DISCARDED_SUFFIX
    candidates = (directory.with_name(f"{name}{number or ''}") for number in itertools.count())
    return directory.rename(next(path for path in candidates if not is_taken(path)))


def is_taken(path: Path) -> bool:
    """Whether a name is in use, if only by a link to nothing."""
    return path.is_symlink() or path.exists()


def data_files(directory: Path) -> list[str]:
    """Returns the files of a checkpoint folder except the manifest, as sorted relative paths.

    NFS keeps a deleted file that somebody still reads under a name like .nfs0001 for a while; it is none of them.
    """
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".nfs"))
    return sorted(name for path in files if (name := path.relative_to(directory).as_posix()) != MANIFEST_NAME)


def file_crc32(path: Path) -> int:
    """Returns the CRC-32 of a file's content."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def write_manifest(
    directory: Path, *, step: int, files: Mapping[str, tuple[int, int]], extra: Mapping[str, Any]
) -> None:
    """Writes the manifest and forces it, and the folder that names the files, to disk.

    Args:
        directory: checkpoint folder.
        step: optimizer steps done.
        files: relative path -> (size in bytes, CRC-32).
        extra: further JSON values, e.g. the fingerprint of the configuration.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "step": step,
        **extra,
        "files": {name: {"size": size, "crc32": crc} for name, (size, crc) in sorted(files.items())},
    }
    with (directory / MANIFEST_NAME).open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(directory)


def sync_folder(directory: Path) -> None:
    """Forces the names in a folder to disk, so that a rename survives a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns the manifest's content.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a manifest, or damaged.
    """
    try:
        content = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("it has no list of files")
    for name, entry in content["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"it names the file {name!r}, which lies outside the checkpoint")
        for field in ("size", "crc32"):
            if not isinstance(entry, dict) or type(entry.get(field)) is not int or entry[field] < 0:
                raise ValueError(f"it does not say the {field} of the file {name!r}")
    return content


def structural_problem(directory: Path) -> str | None:
    """Says in a clause why a folder is not a complete checkpoint; None when it is. Reads no file but the manifest."""
    try:
        return _structural_problem(directory)
    except OSError as error:
        return f"it cannot be read ({error.strerror}: {error.filename})"


def _structural_problem(directory: Path) -> str | None:
    if not directory.is_dir():
        return "there is no such folder"
    if directory.name.endswith(PARTIAL_SUFFIX):
        return "it was not finished (its name still ends in .tmp), probably because the run was killed while saving"
    if not (directory / MANIFEST_NAME).exists():
        return f"it has no {MANIFEST_NAME}, which is written last and deleted first"
    try:
        manifest = read_manifest(directory)
    except (OSError, ValueError) as error:
        return f"its {MANIFEST_NAME} cannot be read ({error})"
    if manifest.get("format_version") != FORMAT_VERSION:
        return f"its format_version is {manifest.get('format_version')}, but this program reads {FORMAT_VERSION}"
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            return f"its file {name} is missing"
        if (size := path.stat().st_size) != entry["size"]:
            return f"its file {name} has {size} bytes instead of {entry['size']}"
    return None


def checksum_problem(directory: Path, name: str, entry: Mapping[str, int]) -> str | None:
    """Says in a clause that the file's content is not what was saved; None when it is."""
    try:
        found = file_crc32(directory / name)
    except OSError as error:
        return f"its file {name} cannot be read ({error.strerror})"
    if found != entry["crc32"]:
        return f"its file {name} has the checksum {found:08x} instead of {entry['crc32']:08x}: the content has changed"
    return None
