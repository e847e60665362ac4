"""Shard sets on object stores and other disks that fsspec reaches: the index lies here, shards are read from there.

A mirror is a folder with everything of a set but its shards, and a file that says where those are. It is opened as any
set is. What is read of a shard is kept in a cache on the node, in blocks of some mebibytes, which all processes of a
node share; the oldest blocks give way. With `order: {block, window}` neighbours are read soon after one another, so a
block serves many samples; in fully random order it serves one, and small blocks are better.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote

from megatron_ove.errors import DataError
from megatron_ove.new_folder import new_folder
from megatron_ove.shards.files import ShardFiles
from megatron_ove.shards.format import INFO_FILE, DatasetInfo, set_mark
from megatron_ove.shards.index import PARTS, load_arrays
from megatron_ove.vocabulary import VOCABULARY_FILE

logger = logging.getLogger(__name__)

REMOTE_FILE = "remote.json"
_MIB = 1 << 20
_LOOK_AFTER = 64
"""The cache is looked through whenever a process has added this part of its size."""
_KEEPS = 0.9
"""Share of the cache's size that is left after old blocks were removed."""
_LOCKS = 64
_TOKENS = re.compile(r"tokens-[0-9a-f]{16}")


@dataclass(frozen=True)
class RemoteSettings:
    """`remote.json`.

    Attributes:
        url: of the set, as fsspec reads it, e.g. s3://bucket/set.
        cache: folder on each node; variables of the environment like $TMPDIR are filled in there.
        max_gib: most that the cache holds.
        block_mib: what is read and kept in one go.
    """

    url: str
    cache: str
    max_gib: float
    block_mib: int

    @classmethod
    def read(cls, directory: Path) -> RemoteSettings | None:
        """Returns those of a mirror; None of a set whose shards lie in its folder.

        Raises:
            DataError: the file cannot be read.
        """
        path = directory / REMOTE_FILE
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            if not all(isinstance(text, str) and text and "\0" not in text for text in (found.url, found.cache)):
                raise ValueError("url and cache are texts")
            if type(found.block_mib) is not int or not 1 <= found.block_mib <= 1024:
                raise ValueError("block_mib is a whole number from 1 to 1024")
            if type(found.max_gib) not in (int, float) or not found.block_mib / 1024 <= found.max_gib <= 1 << 20:
                raise ValueError("max_gib is a number, and a cache holds at least one block")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path} does not say where shards are ({error}); make the mirror again") from error
        return found


def file_system_of(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL and the path on it.

    Raises:
        DataError: nothing that is installed reads such URLs.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except Exception as error:  # each file system fails in its own way
        raise DataError(
            f"{url} cannot be read ({error}); install what fsspec needs for it, or correct the URL"
        ) from error


def make_mirror(settings: RemoteSettings, directory: str | Path) -> DatasetInfo:
    """Copies everything of a remote set but its shards.

    Args:
        settings: where it is and how it is read.
        directory: new folder.

    Raises:
        DataError: it cannot be read, is no shard set, or refers to shards outside of its folder.
    """
    files, root = file_system_of(settings.url)
    with new_folder(directory) as folder:
        try:
            names = {str(entry["name"]).rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(root, detail=True)}
            if INFO_FILE in names:
                for path, target in _files_of_set(files, root, folder, names):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    files.get_file(path, str(target))
        except Exception as error:  # each file system fails in its own way
            raise DataError(f"{settings.url} cannot be read ({error}); check the URL and what it needs") from error
        if not (folder / INFO_FILE).is_file():
            raise DataError(f"{settings.url} is not a shard set, because it holds no {INFO_FILE}; give a set's URL")
        info = DatasetInfo.read(folder)
        _require_own_parts(info, folder, settings.url)
        (folder / REMOTE_FILE).write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
    return info


def _files_of_set(files: Any, root: str, folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Yields (remote file, its place here) of all but shards."""
    for name in names:
        if name in (INFO_FILE, VOCABULARY_FILE, "codec_settings.json"):
            yield f"{root}/{name}", folder / name
        elif name == "index" or _TOKENS.fullmatch(name):
            for path in files.ls(f"{root}/{name}", detail=False):
                yield str(path), folder / name / str(path).rsplit("/", 1)[-1]


def _require_own_parts(info: DatasetInfo, folder: Path, url: str) -> None:
    if not info.num_parts:
        return
    for path in load_arrays(info, folder)[PARTS]["path"].tolist():
        if path.startswith(b"/") or b".." in path.split(b"/"):
            raise DataError(
                f"{url} is joined of parts outside of its folder ({path.decode(errors='replace')}), which are not "
                "reached from here; join parts that lie below it"
            )


class RemoteShardFiles(ShardFiles):
    """Shards read through fsspec, a block at a time, with a cache on this node."""

    def __init__(self, path_of: Callable[[int], Path], directory: Path, settings: RemoteSettings) -> None:
        """
        Args:
            path_of: returns the file that a number would have in `directory`.
            directory: of the mirror.
            settings: of the mirror.
        """
        super().__init__(path_of)
        self._directory, self._settings = directory, settings
        self._block = settings.block_mib * _MIB
        place = os.path.expandvars(settings.cache)
        if "$" in place:
            raise DataError(
                f"the cache {settings.cache} of {directory / REMOTE_FILE} names a variable that is not set on this "
                "node; set it, or make the mirror again with another --cache"
            )
        # Blocks of another version of the set, or of another size, are other blocks.
        name = hashlib.sha256(f"{settings.url}\n{set_mark(directory)}\n{settings.block_mib}".encode()).hexdigest()[:16]
        self.cache = Path(place).expanduser() / name
        self._cleaner = _Cleaner(self.cache, round(settings.max_gib * 1024 * _MIB))
        self._opened: tuple[Any, str] | None = None
        self._locks = [Lock() for _ in range(_LOCKS)]
        self._has_warned = False
        self.num_fetched = 0

    def read(self, number: int, size: int, offset: int) -> bytes:
        parts = []
        for block in range(offset // self._block, (offset + max(size, 1) - 1) // self._block + 1):
            start = block * self._block
            parts.append(self._read_block(number, block, max(0, offset - start), offset + size - start))
        return b"".join(parts)

    def peek(self, number: int, size: int, offset: int) -> bytes:
        files, path = self._place(number)
        return bytes(self._guarded(lambda: files.cat_file(path, start=offset, end=offset + size)))

    def size(self, number: int) -> int:
        files, path = self._place(number)
        return int(self._guarded(lambda: files.size(path)))

    def forget(self, number: int) -> None:
        """Removes the shard's blocks, in case one of them is bad."""
        with suppress(OSError):
            for path in self.cache.glob(f"{self._name(number)}.*"):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Keeps nothing open."""

    def _read_block(self, number: int, block: int, begin: int, end: int) -> bytes:
        path = self.cache / f"{self._name(number)}.{block}"
        with self._locks[hash((number, block)) % _LOCKS]:  # of threads that want one block, one fetches it
            try:
                with path.open("rb") as stream:
                    stream.seek(begin)
                    return stream.read(min(end, self._block) - begin)
            except OSError:  # not there, or the cache cannot be read
                content = self._fetch(number, block)
            self._keep(path, content)
        return content[begin:end]

    def _fetch(self, number: int, block: int) -> bytes:
        files, path = self._place(number)
        self.num_fetched += 1
        start = block * self._block
        return bytes(self._guarded(lambda: files.cat_file(path, start=start, end=start + self._block)))

    def _keep(self, path: Path, content: bytes) -> None:
        """Puts a block into the cache, whole or not at all; a full disk costs speed and nothing else."""
        partial = path.with_name(f".{secrets.token_hex(8)}.writing")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(path)
            self._cleaner.added(len(content))
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%s cannot be written (%s), so every sample is read from afar; free space there, or name another "
                    "--cache",
                    self.cache,
                    error.strerror or error,
                )

    def _place(self, number: int) -> tuple[Any, str]:
        if self._opened is None:
            self._opened = file_system_of(self._settings.url)
        files, root = self._opened
        return files, f"{root.rstrip('/')}/{self._relative(number)}"

    def _relative(self, number: int) -> str:
        return self._path_of(number).relative_to(self._directory).as_posix()

    def _name(self, number: int) -> str:
        return quote(self._relative(number), safe="")

    @staticmethod
    def _guarded(call: Callable[[], Any]) -> Any:
        """Turns whatever a file system raises into an OSError, after which a read is tried again."""
        try:
            return call()
        except OSError:
            raise
        except Exception as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


class _Cleaner:
    """Keeps a folder of blocks within a size; any number of processes do so at the same time."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._added = limit  # looks at once: there may be blocks of an earlier run

    def added(self, num_bytes: int) -> None:
        """Says that a block was added; removes the oldest ones now and then."""
        self._added += num_bytes
        if self._added < self._limit / _LOOK_AFTER:
            return
        self._added = 0
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        if total <= self._limit:
            return
        for _, size, path in sorted(found):
            Path(path).unlink(missing_ok=True)
            total -= size
            if total <= self._limit * _KEEPS:
                return
