"""`ShardSet`: random access to a shard set through its index.

Reading is one `pread` per member, by any number of threads. Files are opened when first needed, so a ShardSet can be
sent to another process.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.shards import format as layout
from megatron_ove.shards.documents import Document
from megatron_ove.shards.files import ShardFiles
from megatron_ove.shards.format import DatasetInfo
from megatron_ove.shards.index import ShardIndex, index_of, load_arrays
from megatron_ove.shards.joined import JoinedIndex
from megatron_ove.shards.opening import array_problems, content_problems, index_problems
from megatron_ove.shards.remote import RemoteSettings, RemoteShardFiles
from megatron_ove.vocabulary import Vocabulary


def files_of(index: ShardIndex, directories: Sequence[Path]) -> ShardFiles:
    """Returns how the shards of sets are read: here, or, of a mirror, where they are.

    Raises:
        DataError: a mirror's description is wrong, or one of several sets is one.
    """
    remote = [settings for directory in directories if (settings := RemoteSettings.read(directory)) is not None]
    if remote and len(directories) > 1:
        raise DataError(
            f"{remote[0].url} is read through a mirror, which is not done for one of several sets of a source; make a "
            "source of it"
        )
    if remote:
        return RemoteShardFiles(index.shard_path, directories[0], remote[0])
    return ShardFiles(index.shard_path)


class ReadError(DataError):
    """A member could not be read, by the disk's doing: another attempt may succeed."""


class ShardSet:
    """A shard set opened for reading.

    Attributes:
        directory: its folder, the first of several.
        directories: its folders.
        info: dataset.json.
        index: where samples lie.
        files: its open shards.
    """

    def __init__(self, directory: Path, info: DatasetInfo, index: ShardIndex, directories: Sequence[Path] = ()) -> None:
        """Use `ShardSet.open`, which checks what it reads."""
        self.directory = directory
        self.directories = tuple(directories) or (directory,)
        self.info = info
        self.index = index
        self.files = files_of(index, self.directories)

    @classmethod
    def open(cls, directory: str | Path, *, looks_at_shards: bool = True) -> ShardSet:
        """Opens a shard set and compares index and description.

        Args:
            directory: its folder.
            looks_at_shards: whether the index is also compared with the shard files, at most three looks at the files
                of each part, and labels are looked through; of many ranks one does it.

        Raises:
            DataError: one sentence a line for everything that is wrong.
        """
        path = Path(directory)
        info = DatasetInfo.read(path)
        arrays = load_arrays(info, path)
        problems = array_problems(info, arrays, path)
        if not problems:
            index = index_of(info, path, arrays)
            problems = index_problems(index)
            opened = cls(path, info, index)
            if looks_at_shards and not problems:
                problems = content_problems(index, opened.files)
                opened.close()  # nothing says that these shards are the next that are read
            if not problems:
                return opened
        raise DataError("\n".join(problems))

    @classmethod
    def open_all(cls, directories: Sequence[str | Path], *, looks_at_shards: bool = True) -> ShardSet:
        """Opens several sets as one whose samples come one set after the other; `directory` is that of the first.

        Raises:
            DataError: one sentence a line for everything that is wrong with any, or if they are no one set.
        """
        opened, problems = [], []
        real = [Path(directory).resolve() for directory in directories]
        for directory in directories:
            try:
                if real.count(Path(directory).resolve()) > 1:
                    raise DataError(f"{directory} is named twice, so its samples would count twice; name each set once")
                opened.append(cls.open(directory, looks_at_shards=looks_at_shards))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("\n".join(problems))
        if len(opened) == 1:
            return opened[0]
        index = JoinedIndex([shards.index for shards in opened])
        return cls(index.directory, index.info, index, tuple(shards.directory for shards in opened))

    def __len__(self) -> int:
        return self.info.num_samples

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Column of the index -> one number (or row of them) a sample."""
        return self.index.columns

    @property
    def labels(self) -> np.ndarray:
        """[n, L] int32, -1 = none; L is 0 of documents without labels."""
        return self.index.labels

    @property
    def width(self) -> np.ndarray:
        """[n] int32 pixels, EXIF orientation applied; of a frame for clips. Documents have `page_sizes`."""
        return self.columns["width"]

    @property
    def height(self) -> np.ndarray:
        """[n] int32 pixels, EXIF orientation applied; of a frame for clips. Documents have `page_sizes`."""
        return self.columns["height"]

    @property
    def num_patches(self) -> np.ndarray:
        """[n] integers: selected patches of a clip; patches that cover a picture, or all pages, at their own size."""
        if not self.info.has_pages:
            return self.columns["num_patches"]
        counts, sizes = self.page_sizes(np.arange(len(self)))
        patches = (-(-sizes // self.info.patch_size)).astype(np.int64).prod(axis=1)
        return np.add.reduceat(patches, np.cumsum(counts) - counts)

    @property
    def num_pages(self) -> np.ndarray:
        """[n] int32: pages of each document; memory-mapped."""
        return self.columns["num_pages"]

    def page_sizes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns pages of documents.

        Args:
            rows: [n] int64.

        Returns:
            [n] int64, pages of each; [all of them, 2] int64, (height, width) of each in pixels, one document's after
            the other's.
        """
        firsts = self.index.first_page[rows]
        counts = self.index.first_page[rows + 1] - firsts
        places = np.repeat(firsts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        sizes = np.stack([self.index.page_heights[places], self.index.page_widths[places]], axis=1)
        return counts, sizes.astype(np.int64)

    def key(self, i: int) -> str:
        """Returns the key of sample `i`."""
        return self.index.key(i)

    def shard_path(self, i: int) -> Path:
        """Returns the file that holds sample `i`."""
        return self.index.shard_path(self.index.shard_of(i))

    def describe(self, i: int) -> str:
        """Returns how messages name sample `i`: its key, number and file."""
        return f"sample '{self.key(i)}' (number {i}) of {self.shard_path(i)}"

    def read(self, i: int, member: str) -> bytes:
        """Returns the bytes of one member of sample `i`. Threads may read at the same time.

        Raises:
            ReadError: the file is gone, cannot be read or ends early.
            OSError: this process or the system has too many open files, which is no fault of the sample.
        """
        shard = self.index.shard_of(i)
        offset, size = self.index.place(i, member)
        if offset + size > self.index.shard_end(shard):
            raise DataError(
                f"{member} of {self.describe(i)} lies behind the shard's end by its index, so the index is damaged; "
                "copy it again or write the shard set again"
            )
        try:
            data = self.files.read(shard, size, offset)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            self.files.forget(shard)
            raise ReadError(
                f"{member} of {self.describe(i)} cannot be read ({error.strerror or error}); check the disk"
            ) from error
        if len(data) != size:
            self.files.forget(shard)
            raise ReadError(
                f"{member} of {self.describe(i)} ends after {len(data)} of {size} bytes, so the shard is truncated; "
                "copy or write it again"
            )
        return data

    def read_document(self, i: int) -> Document:
        """Returns what is written in document `i`.

        Raises:
            DataError: it cannot be read, or says nothing that can be used; names the sample.
        """
        _, sizes = self.page_sizes(np.array([i]))
        try:
            return Document.decode(self.read(i, layout.DOCUMENT_MEMBER), [(int(h), int(w)) for h, w in sizes])
        except ReadError:
            raise
        except DataError as error:
            raise DataError(f"{self.describe(i)}: {error}; copy or write its shard again") from error

    def read_vocabulary(self) -> Vocabulary | None:
        """Returns the words of the label ids; None where the folder holds none. Reads and checks the file anew.

        Raises:
            DataError: the file is no vocabulary, or has another number of words than the set has classes.
        """
        return layout.read_vocabulary(self.directory, self.info)

    def close(self) -> None:
        """Closes the shard files; reading opens them again."""
        self.files.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"directories": self.directories}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(vars(ShardSet.open_all(state["directories"], looks_at_shards=False)))

    def __del__(self) -> None:
        if hasattr(self, "files"):
            self.close()
