"""Shard sets of format 1 as such of the present format, without loss."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.new_folder import new_folder
from megatron_ove.shards.format import FORMAT_VERSION, DatasetInfo, set_mark
from megatron_ove.shards.old_index import rows_of_format_1
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.writer import COMPANIONS

_NOT_LINKABLE = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


def rewrite_shard_set(directory: Path, output: Path) -> DatasetInfo:
    """Writes a set of format 1 anew; its tar files become links to the same content, or copies on another disk.

    Args:
        directory: of the set; it stays as it is.
        output: new folder.

    Raises:
        DataError: `directory` is no set of format 1, is damaged, or `output` holds something.
    """
    shards = ShardSet.open(directory)
    if shards.info.format_version == FORMAT_VERSION:
        raise DataError(f"{directory} has the present format {FORMAT_VERSION} already, so there is nothing to rewrite")
    info = replace(shards.info, format_version=FORMAT_VERSION, content=set_mark(directory))
    arrays = rows_of_format_1(info, shards.columns, directory)
    with new_folder(output) as folder:
        (folder / "shards").mkdir()
        (folder / "index").mkdir()
        for number in shards.index.shard_rows():
            path = shards.index.shard_path(number)
            for source in (path, path.with_name(f"{path.name}.idx")):
                if source.exists():
                    _link_or_copy(source, folder / "shards" / source.name)
        for name in COMPANIONS:
            if (shards.directory / name).is_file():
                shutil.copyfile(shards.directory / name, folder / name)
        for name, array in arrays.items():
            np.save(folder / "index" / f"{name}.npy", array)
        info.write(folder)
    return info


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NOT_LINKABLE:
            raise
        shutil.copyfile(source, target)
