"""`ShardSet`: random access to a shard set through its memory-mapped index; and the door to its writer and checks.

Reading is one `pread` per member, by any number of threads. Files are opened when first needed, so a ShardSet can be
sent to another process.
"""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ove.data import shard_format as layout
from megatron_ove.data.shard_files import ShardFiles
from megatron_ove.data.shard_format import DatasetInfo
from megatron_ove.data.shard_validation import (
    deep_problems,
    index_problems,
    label_problems,
    shard_problems,
    vocabulary_problems,
)
from megatron_ove.data.shard_writer import INDEX_FILES, ShardWriter
from megatron_ove.errors import DataError
from megatron_ove.vocabulary import Vocabulary

__all__ = ["DatasetInfo", "ReadError", "ShardSet", "ShardWriter", "validate_shard_set"]


class ReadError(DataError):
    """A member could not be read, by the disk's doing: another attempt may succeed."""


class ShardSet:
    """A shard set opened for reading.

    Attributes:
        directory: its folder.
        info: dataset.json.
        columns: index array name -> memory-mapped array with one row a sample.
        files: its open shards.
    """

    def __init__(self, directory: Path, info: DatasetInfo, columns: dict[str, np.ndarray]) -> None:
        """Use `ShardSet.open`, which checks what it reads."""
        self.directory = directory
        self.info = info
        self.columns = columns
        self._column_of = {member: i for i, member in enumerate(info.members)}
        self.files = ShardFiles(partial(_shard_path, directory))

    @classmethod
    def open(cls, directory: str | Path) -> ShardSet:
        """Opens a shard set and compares index, shards and description.

        Raises:
            DataError: one sentence a line for everything that is wrong.
        """
        path = Path(directory)
        info = DatasetInfo.read(path)
        columns = {name: _map_column(path / "index" / f"{name}.npy") for name in INDEX_FILES}
        problems = index_problems(info, columns, path)
        if not problems:
            problems = label_problems(info, columns, path, every=False) + shard_problems(info, columns, path)
        if problems:
            raise DataError("\n".join(problems))
        return cls(path, info, columns)

    def __len__(self) -> int:
        return self.info.num_samples

    @property
    def labels(self) -> np.ndarray:
        """[n, L] int32, -1 = none."""
        return self.columns["labels"]

    @property
    def width(self) -> np.ndarray:
        """[n] int32 pixels, EXIF orientation applied; of a frame for clips."""
        return self.columns["width"]

    @property
    def height(self) -> np.ndarray:
        """[n] int32 pixels, EXIF orientation applied; of a frame for clips."""
        return self.columns["height"]

    @property
    def num_patches(self) -> np.ndarray:
        """[n] int32: selected patches of a clip; patches that cover a picture at its own size."""
        return self.columns["num_patches"]

    def key(self, i: int) -> str:
        """Returns the key of sample `i`."""
        return bytes(self.columns["keys"][i]).decode()

    def shard_path(self, number: int) -> Path:
        """Returns the file of a shard."""
        return _shard_path(self.directory, number)

    def describe(self, i: int) -> str:
        """Returns how messages name sample `i`: its key, number and file."""
        return f"sample '{self.key(i)}' (number {i}) of {self.shard_path(int(self.columns['shard'][i]))}"

    def read(self, i: int, member: str) -> bytes:
        """Returns the bytes of one member of sample `i`. Threads may read at the same time.

        Raises:
            ReadError: the file is gone, cannot be read or ends early.
            OSError: this process or the system has too many open files, which is no fault of the sample.
        """
        column, shard = self._column_of[member], int(self.columns["shard"][i])
        offset, size = int(self.columns["offsets"][i, column]), int(self.columns["sizes"][i, column])
        try:
            data = self.files.read(shard, size, offset)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            self.files.forget(shard)
            raise ReadError(
                f"{member} of {self.describe(i)} cannot be read ({error.strerror}); check the disk"
            ) from error
        if len(data) != size:
            self.files.forget(shard)
            raise ReadError(
                f"{member} of {self.describe(i)} ends after {len(data)} of {size} bytes, so the shard is truncated; "
                "copy or write it again"
            )
        return data

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
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(vars(ShardSet.open(state["directory"])))

    def __del__(self) -> None:
        if hasattr(self, "files"):
            self.close()


def validate_shard_set(directory: str | Path, *, deep: bool) -> list[str]:
    """Checks a shard set, with its vocabulary if it has one.

    Args:
        directory: its folder.
        deep: also compare every tar header, decode every picture and compare every label.

    Returns:
        One sentence per problem; empty when all is well.
    """
    try:
        shards = ShardSet.open(directory)
    except DataError as error:
        return str(error).split("\n")
    return vocabulary_problems(shards) + (deep_problems(shards) if deep else [])


def _shard_path(directory: Path, number: int) -> Path:
    return directory / "shards" / layout.shard_name(number)


def _map_column(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"the index file {path} is missing or unreadable ({error}); copy it again or write the shard set again"
        ) from error
