"""Format 1 of the index in the form of format 2; the tar files are the same in both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.shards import index as files
from megatron_ove.shards.format import DatasetInfo


def rows_of_format_1(info: DatasetInfo, arrays: Mapping[str, np.ndarray], directory: Path) -> dict[str, np.ndarray]:
    """Returns the files of format 2 that say what columns of format 1 say.

    Args:
        info: dataset.json of format 1.
        arrays: its columns, of the right shapes.
        directory: of the set, for messages.

    Raises:
        DataError: members of a sample do not lie side by side, or a shard is left out, as no writer did it.
    """
    offsets, sizes = arrays["offsets"].astype(np.int64), arrays["sizes"]
    if (offsets[:, 1:] != offsets[:, :-1] + files.padded(sizes[:, :-1])).any():
        raise DataError(
            f"members of a sample of {directory} do not lie side by side, as no writer of ours did it; write it again"
        )
    rows = np.zeros(info.num_samples, dtype=info.row_type)
    rows["offset"], rows["sizes"], rows["labels"] = arrays["offsets"][:, 0], arrays["sizes"], arrays["labels"]
    old = files.ColumnIndex(info, directory, arrays)
    ranges = old.shard_rows()
    if list(ranges) != list(range(len(ranges))):
        raise DataError(f"{directory} leaves out the number of a shard, as no writer of ours did it; write it again")
    shards = [(mine.start, old.shard_end(number)) for number, mine in ranges.items()]
    return {
        files.ROWS: rows,
        files.SHARDS: np.array(shards, dtype=files.SHARD_TYPE),
        **{name: np.asarray(arrays[name]) for name in (files.KEYS, *files.SIZE_COLUMNS)},
    }
