"""A user's folder as a list of inputs, always in the same order; what is not one is counted, nothing is passed over."""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ove.errors import DataError
from megatron_ove.preprocess.file_kinds import HEAD_BYTES, SUFFIXES, FileKind, looks_like
from megatron_ove.preprocess.input_files import InputFile, real_path, sample_key, state_of
from megatron_ove.preprocess.pictures import sheets_of
from megatron_ove.rejects import printable

_NAMES: dict[FileKind, str] = {"picture": "picture", "video": "clip", "document": "PDF"}
_MOST_SUFFIXES_NAMED = 12


@dataclass
class _Found:
    """What a folder holds besides what was looked for.

    Attributes:
        folder: as given.
        others: name -> real path of files that are of another kind.
        again: name -> real path of what leads to a file that is among these or what was looked for by another name.
        skipped: why -> number of entries that are not looked into.
        unreadable: folders and files that could not be looked at -> the reason.
    """

    folder: Path
    others: dict[str, Path] = field(default_factory=dict, kw_only=True)
    again: dict[str, Path] = field(default_factory=dict, kw_only=True)
    skipped: Counter[str] = field(default_factory=Counter, kw_only=True)
    unreadable: dict[Path, str] = field(default_factory=dict, kw_only=True)

    @property
    def wanted(self) -> str:
        """What was looked for, for sentences."""
        raise NotImplementedError

    @property
    def other_files(self) -> Counter[str]:
        """Suffix -> number of files that are of another kind."""
        return Counter(_suffix(name) for name in self.others)

    def take_others(self, suffix: str) -> dict[str, Path]:
        """Hands over the files of another kind with this suffix (in lower case), under each name they have.

        Returns:
            Name -> real path, sorted by name; they no longer count as ignored.
        """
        taken = {name: path for name, path in {**self.others, **self.again}.items() if _suffix(name) == suffix}
        for name in taken:
            self.others.pop(name, None)
            self.again.pop(name, None)
        return dict(sorted(taken.items()))

    def ignored_sentence(self) -> str:
        """Says what was left aside, with a count per suffix; "" if nothing was."""
        parts = []
        if self.others:
            by_count = sorted(self.other_files.items(), key=lambda item: (-item[1], item[0]))
            common = by_count[:_MOST_SUFFIXES_NAMED]
            counts = [f"{printable(suffix) or 'without suffix'} {count}" for suffix, count in common]
            rest = len(self.others) - sum(count for _, count in common)
            counts += [f"other suffixes {rest}"] if rest else []
            parts.append(f"{len(self.others)} files that hold no {self.wanted} ({', '.join(counts)})")
        parts += [f"{len(self.again)} more paths to the same file"] if self.again else []
        parts += [f"{count} {why}" for why, count in sorted(self.skipped.items())]
        return f"ignored below {self.folder}: {'; '.join(parts)}" if parts else ""


@dataclass
class Listing(_Found):
    """Inputs of a folder.

    Attributes:
        kind: what was looked for.
        inputs: what a tool tries, sorted by name; one for each sheet of a file with several. All else is of another
            kind by its suffix and its first bytes.
    """

    kind: FileKind
    inputs: list[InputFile] = field(default_factory=list)

    @property
    def wanted(self) -> str:
        return _NAMES[self.kind]


@dataclass
class NamedFiles(_Found):
    """Files of a folder that are known by their names.

    Attributes:
        what: what was looked for, e.g. "tar".
        files: name below the folder -> real path, sorted by name.
    """

    what: str
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def wanted(self) -> str:
        return self.what

    def sentences(self) -> list[str]:
        """Says what was left aside and what could not be looked at; [] if nothing was."""
        return [*filter(None, [self.ignored_sentence()]), *self.unreadable.values()]


def list_named(folder: str | Path, suffixes: tuple[str, ...], what: str) -> NamedFiles:
    """Looks through `folder` as `list_inputs` does, for files whose names end in one of `suffixes` in any case.

    Args:
        folder: must exist.
        suffixes: in lower case, with their dots.
        what: names such files.
    """
    found = NamedFiles(Path(folder), what)
    seen: set[Path] = set()
    for name, path in _walk(found.folder, found):
        if path in seen:
            found.again[name] = path
            continue
        seen.add(path)
        if not path.is_file():
            found.skipped["pipes, sockets and devices" if path.exists() else "links to nothing"] += 1
        elif name.lower().endswith(suffixes):
            found.files[name] = path
        else:
            found.others[name] = path
    found.files = dict(sorted(found.files.items()))
    return found


def list_inputs(folder: str | Path, kind: FileKind) -> Listing:
    """Looks through `folder`, its subfolders and the folders that links in it lead to.

    Every regular file becomes an input, or is counted as ignored: one with a suffix of the kind is an input, any other
    one if its first bytes are those of the kind. Hidden files and folders are left aside. A folder or file that can be
    reached in several ways counts once, so links in a circle do no harm.

    Raises:
        DataError: `folder` does not exist, is a file, or holds no input.
    """
    root = Path(folder)
    if not root.is_dir():
        state = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"the {_NAMES[kind]} folder {root} {state}; give the folder that holds your {_NAMES[kind]}s")
    listing = Listing(root, kind)
    seen: set[Path] = set()
    files: list[tuple[str, Path, list[int]]] = []
    for name, path in _walk(root, listing):
        if path in seen:
            listing.again[name] = path
            continue
        seen.add(path)
        state = _state_of_input(path, name, listing)
        if state is not None:
            files.append((name, path, state))
    for name, path, state in sorted(files):
        sheets = sheets_of(path, suffix=_suffix(name)) if kind == "picture" else (0,)
        listing.inputs += [InputFile(path, name, sample_key(name, sheet), sheet, state) for sheet in sheets]
    if not listing.inputs:
        ignored = listing.ignored_sentence() or "it is empty"
        problem = "".join(f"; {reason}" for reason in list(listing.unreadable.values())[:1])
        raise DataError(
            f"the {_NAMES[kind]} folder {root} holds no {_NAMES[kind]}, not even in its subfolders{problem}; "
            f"{ignored}; put {_NAMES[kind]}s there or give another folder"
        )
    return listing


def _walk(root: Path, listing: _Found) -> Iterator[tuple[str, Path]]:
    """Yields (name below the root, real path) of every entry that is no folder.

    What is behind links comes last, so that a file's own name wins. Only links are followed to the end one by one;
    everything else in a real folder has a real path.
    """
    visited: set[tuple[int, int]] = set()
    folders, links = deque([("", real_path(root))]), deque[tuple[str, Path]]()
    linked_files: list[tuple[str, Path]] = []

    def visit(prefix: str, folder: Path) -> Iterator[tuple[str, Path]]:
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in visited:
                listing.skipped["links to folders that are looked through already"] += 1
                return
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            reason = f"the folder {folder} cannot be looked through ({error.strerror}); check its permissions"
            listing.unreadable[folder] = reason
            return
        for entry in found:
            is_folder = _is_folder(entry)
            if entry.name.startswith("."):
                listing.skipped["hidden folders" if is_folder else "hidden files"] += 1
                continue
            is_link = entry.is_symlink()
            path = real_path(Path(entry.path)) if is_link else Path(entry.path)
            if is_folder:
                (links if is_link else folders).append((f"{prefix}{entry.name}/", path))
            elif is_link:
                linked_files.append((prefix + entry.name, path))
            else:
                yield prefix + entry.name, path

    while folders or links:
        yield from visit(*(folders or links).popleft())
    yield from linked_files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _state_of_input(path: Path, name: str, listing: Listing) -> list[int] | None:
    """Returns the state of a file, found by this name below the folder, if a tool should try it; else counts it."""
    suffix = _suffix(name)
    try:
        status = path.stat()
    except OSError:
        if suffix in SUFFIXES[listing.kind]:
            return state_of(None)
        listing.skipped["links to nothing"] += 1
        return None
    if not stat.S_ISREG(status.st_mode):
        listing.skipped["pipes, sockets and devices"] += 1
        return None
    if suffix in SUFFIXES[listing.kind]:
        return state_of(status)
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as error:
        listing.unreadable[path] = f"{path} cannot be read ({error.strerror}); check its permissions"
        return None
    if looks_like(head, listing.kind):
        return state_of(status)
    listing.others[name] = path
    return None
