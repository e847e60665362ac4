"""Checkpoints are data: nothing in them is run when they are looked at, converted, started from or resumed.

torch reads the index of a checkpoint (`.metadata`) and the objects in it with plain pickle, which runs whatever the
file asks for. Here the index is read with a list of the classes that an index is made of, and objects are read once
with torch's own restricted reader before anything else may read them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from megatron_ove.errors import CheckpointError

_CHECKPOINT = "torch.distributed.checkpoint"
_OF_INDEX: Mapping[str, frozenset[str]] = {
    f"{_CHECKPOINT}.metadata": frozenset(
        {"Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"}
        | {"ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"}
    ),
    f"{_CHECKPOINT}.filesystem": frozenset({"_StorageInfo"}),
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    # Where it was saved, as a path; it names a place and opens nothing.
    "pathlib": frozenset({"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}),
    "pathlib._local": frozenset({"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}),
    "collections": frozenset({"OrderedDict"}),
}
_OF_HISTORY: Mapping[str, frozenset[str]] = {
    "collections": frozenset({"OrderedDict"}),
    "torch": frozenset({"Size", "device"}),
    "torch._utils": frozenset({"_rebuild_tensor_v2"}),
    "torch.storage": frozenset({"_load_from_bytes"}),
    "transformer_engine.common.recipe": frozenset(
        {"DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling", "Float8BlockScaling", "Format", "_FormatHelper"}
        | {"_OverrideLinearPrecision", "QParams", "MMParams"}
    ),
}
"""What Transformer Engine's FP8 history is made of."""
_HISTORY = "_extra_state"
_FORCED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _UntrustedError(Exception):
    """Says which class a pickle asked for."""


class _DataUnpickler(pickle.Unpickler):
    """Knows the classes of a list, and torch's dtypes."""

    def __init__(self, stream: io.BufferedIOBase, allowed: Mapping[str, frozenset[str]]) -> None:
        super().__init__(stream)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes") and name in self._allowed.get(module, ()):
            return _load_from_bytes
        if name in self._allowed.get(module, ()) or (module == "torch" and isinstance(_dtype(name), torch.dtype)):
            return super().find_class(module, name)
        raise _UntrustedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _UntrustedError(f"an object stored elsewhere, {str(pid)[:40]}")


def _dtype(name: str) -> object:
    return getattr(torch, name, None) if name.isidentifier() else None


def _load_from_bytes(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def read_metadata(folder: str | Path) -> Metadata:
    """Returns the index of a checkpoint; runs nothing.

    Raises:
        CheckpointError: it cannot be read, asks for something that no index needs, or names files elsewhere.
    """
    path = Path(folder) / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _DataUnpickler(stream, _OF_INDEX).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}")
        for info in (metadata.storage_data or {}).values():
            name = info.relative_path
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"it names the file {str(name)[:60]!r}, which lies elsewhere")
    except _UntrustedError as error:
        raise CheckpointError(
            f"{path} asks for {error}, which no index of a checkpoint needs: it was made to run something; do not use "
            "this checkpoint, and tell whoever gave it to you"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); use another checkpoint") from error
    except Exception as error:  # changed bytes can raise anything
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); use another checkpoint") from error
    return metadata


class TrustedReader(FileSystemReader):
    """torch's reader of checkpoints, with an index that is data."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Returns the index; see `read_metadata` of this module."""
        del args, options
        metadata = read_metadata(str(self.path))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def require_data(folder: str | Path, *, looks_at_objects: bool = True) -> None:
    """Refuses a checkpoint that would run something when megatron-core reads it.

    Args:
        folder: the checkpoint.
        looks_at_objects: whether its objects (generators, FP8 history) will be read, so are to be looked at; some
            kilobytes a rank that wrote it.

    Raises:
        CheckpointError: it would, or cannot be read.
    """
    if os.environ.get(_FORCED, "").lower() in ("1", "y", "yes", "true"):
        raise CheckpointError(f"{_FORCED} is set, with which torch runs what checkpoints ask for; unset it")
    _require_known_form(Path(folder))
    metadata = read_metadata(folder)
    if looks_at_objects:
        for key, content in _objects(Path(folder), metadata):
            _require_plain(Path(folder), key, content)


def _require_known_form(folder: Path) -> None:
    """Refuses forms of checkpoints other than torch's, whose readers have doors of their own."""
    path = folder / "metadata.json"
    try:
        form = json.loads(path.read_text(encoding="utf-8"))
        known = (form["sharded_backend"], form["common_backend"]) == ("torch_dist", "torch")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint") from error
    if not known:
        raise CheckpointError(
            f"{path} names another form than this program writes (torch_dist, torch); use another checkpoint"
        )


def _objects(folder: Path, metadata: Metadata) -> Iterator[tuple[str, bytes]]:
    """Yields (key, content) of everything that is no tensor."""
    for index, info in (metadata.storage_data or {}).items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / info.relative_path).open("rb") as stream:
                stream.seek(info.offset)
                yield index.fqn, stream.read(info.length)


def _require_plain(folder: Path, key: str, content: bytes) -> None:
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if key.rpartition("/")[0].endswith(_HISTORY) or key.endswith(_HISTORY):
            _require_plain_history(value)
    except Exception as error:  # a foreign pickle can raise anything
        reason = str(error).split("\n")[0][:200]
        raise CheckpointError(
            f"{folder} holds an object '{key}' that is more than numbers ({reason}), so reading it could run "
            "something; do not use this checkpoint"
        ) from error


def _require_plain_history(value: Any) -> None:
    """Looks into what Transformer Engine unpickles once more."""
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.numel():
        content = value.cpu().numpy().tobytes()
    elif isinstance(value, io.BytesIO) and value.getbuffer().nbytes:
        content = value.getvalue()
    else:
        return
    if content.startswith(b"PK"):
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    else:
        _DataUnpickler(io.BytesIO(content), _OF_HISTORY).load()
