"""Files of image-text data sets as HuggingFace stores them: which there are, and their record batches one by one.

Read with pyarrow alone (the extra "arrow"): parquet files of a hub snapshot, and Arrow streams of `save_to_disk`, whose
`state.json` says which files belong to it.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.folders import NamedFiles, list_named
from megatron_ove.preprocess.input_files import real_path

PARQUET, ARROW = ".parquet", ".arrow"
_STATE, _STATE_FILES = "state.json", "_data_files"
_CACHE_PREFIX = "cache-"
"""Of results of `map` and `filter`, which lie beside a data set's own files."""
_PARQUET_MARK, _FILE_FORMAT_MARK = b"PAR1", b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_BATCH_ROWS = 64


def require_pyarrow() -> Any:
    """Returns the module; raises `DataError` with what to install."""
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError("data sets of HuggingFace are read with pyarrow, which is not installed; pip install pyarrow")
    module = importlib.import_module("pyarrow")
    for name in ("pyarrow.parquet", "pyarrow.ipc"):
        importlib.import_module(name)
    return module


def list_data_files(folder: Path, pattern: str = "*", *, say: Callable[[str], object] = str) -> dict[str, Path]:
    """Returns the files that hold the rows, sorted by name.

    Args:
        folder: of `save_to_disk` (of one split or of several), of a hub snapshot, or a single file.
        pattern: only files whose path below the folder matches, e.g. "data/train-*".
        say: called with a sentence on what in the folder is left aside; `str` says nothing.

    Returns:
        Path below the folder -> real path, which may have another suffix: a snapshot of the hub holds links to blobs.

    Raises:
        DataError: there is no such folder, none of its files matches, or one that `state.json` names is missing.
    """
    if folder.is_file():
        return {folder.name: real_path(folder)}
    if not folder.is_dir():
        raise DataError(f"the data set {folder} does not exist; give a folder with parquet files or of save_to_disk")
    listing = list_named(folder, (PARQUET, ARROW), "rows")
    found = listing.files
    for name in [name for name in found if Path(name).name.startswith(_CACHE_PREFIX)]:
        del found[name]
        listing.skipped[f"files {_CACHE_PREFIX}* of results of map and filter"] += 1
    for name in sorted(name for name in {**listing.others, **listing.again} if Path(name).name == _STATE):
        _keep_named(listing, name)
    for sentence in listing.sentences():
        say(sentence)
    chosen = {name: found[name] for name in sorted(found) if fnmatch.fnmatchcase(name, pattern)}
    if not chosen:
        names = f": {', '.join(sorted(found)[:3])}, ..." if found else ""
        raise DataError(
            f"{folder} holds {len(found)} parquet and Arrow files{names}, of which none matches '{pattern}'; give "
            "another folder or pattern"
        )
    return chosen


def _keep_named(listing: NamedFiles, state_name: str) -> None:
    """Takes the files beside a `state.json` that it does not name out of the listing.

    Raises:
        DataError: one that it names is not there, or it names none.
    """
    state, beside = listing.folder / state_name, PurePosixPath(state_name).parent
    listing.others.pop(state_name, None)  # it is read
    try:
        named = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))[_STATE_FILES]]
        own = {(beside / name).as_posix() for name in named}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{state} does not say which files the data set has ({error!r}); save it again") from error
    missing = sorted(own - listing.files.keys() - listing.again.keys())
    if missing:
        raise DataError(f"{state} names the file {missing[0]}, which is not there; copy the data set again")
    for name in [name for name in listing.files if PurePosixPath(name).parent == beside and name not in own]:
        del listing.files[name]
        listing.skipped[f"files that {_STATE} does not name"] += 1


def first_schema(paths: Iterable[Path]) -> tuple[Path, Any]:
    """Returns the first file that can be read, and its schema; raises `DataError` of the first one if none can be."""
    problems: list[DataError] = []
    for path in paths:
        try:
            return path, read_schema(path)
        except DataError as error:
            problems.append(error)
    raise problems[0]


def read_schema(path: Path) -> Any:
    """Returns the file's `pyarrow.Schema`; raises `DataError` if it is no such file or damaged."""
    arrow = require_pyarrow()
    try:
        if _begins_with(path, _PARQUET_MARK):
            schema = arrow.parquet.read_schema(path)
        else:
            with arrow.memory_map(str(path)) as source:
                schema = _open_arrow(arrow, source, path).schema
        assert isinstance(schema.names, list)  # which decodes them
        return schema
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def read_batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Yields `pyarrow.RecordBatch`es with these columns; few rows are in memory at a time.

    Raises:
        DataError: the file is damaged from here on; what came before is right.
    """
    arrow = require_pyarrow()
    try:
        if _begins_with(path, _PARQUET_MARK):
            with arrow.parquet.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns))
            return
        with arrow.memory_map(str(path)) as source:
            reader = _open_arrow(arrow, source, path)
            if hasattr(reader, "num_record_batches"):
                batches = (reader.get_batch(place) for place in range(reader.num_record_batches))
            else:
                batches = iter(reader)
            for batch in batches:
                yield batch.select(list(columns))
            if not hasattr(reader, "num_record_batches") and not _has_end(path):
                raise DataError(f"{path} lacks the mark that ends a stream, so rows may be missing; copy it again")
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def is_sound(batch: Any) -> bool:
    """Whether every value of a `pyarrow.RecordBatch` is where its file says; reading others can end the process."""
    try:
        batch.validate(full=True)
    except (require_pyarrow().ArrowException, ValueError):
        return False
    return True


def _begins_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(mark)) == mark


def _open_arrow(arrow: Any, source: Any, path: Path) -> Any:
    is_file = _begins_with(path, _FILE_FORMAT_MARK)
    return arrow.ipc.open_file(source) if is_file else arrow.ipc.open_stream(source)


def _has_end(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - len(_STREAM_END)))
        return stream.read() == _STREAM_END


def _damaged(path: Path, error: Exception) -> DataError:
    detail = str(error).split("\n")[0][:200]
    return DataError(f"{path} is damaged or of another form ({detail}); what came before is used, copy it again")
