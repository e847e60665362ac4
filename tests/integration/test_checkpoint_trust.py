"""A checkpoint with a program in any of its pickles runs nothing: a sentence, and no side effect."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_ove.checkpoint.manifest import MANIFEST_NAME
from megatron_ove.checkpoint.trust import read_metadata, require_data
from megatron_ove.cli.main import main
from megatron_ove.convert.checkpoint_files import read_tensors, stored_keys
from megatron_ove.errors import CheckpointError
from tests.distributed.test_toy_kinds import NUM_STEPS, toy_config, walk
from tests.support.distributed import WorkerError, run_distributed
from tests.support.tiny_run import write_tiny_sources


class Gadget:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("trained")
    data = toy_config(write_tiny_sources(folder), folder / "run", encoder="onevision")
    data["objectives"] = {"classes": data["objectives"]["classes"]}
    data["data"]["sources"].pop("pages")
    run_distributed(walk, 1, {"run": data})
    return data, folder / "run"


@pytest.fixture
def copied(trained: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """Returns (configuration, checkpoint) of a run of which nothing else knows."""
    data, run = trained
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("lock"))
    checkpoint = tmp_path / f"run/checkpoints/step_{NUM_STEPS:08d}"
    for other in checkpoint.parent.iterdir():
        if other != checkpoint:
            shutil.rmtree(other)
    return {**data, "run_dir": str(tmp_path / "run")}, checkpoint


def write_index(checkpoint: Path, content: bytes) -> None:
    """Replaces the index, and the manifest's idea of it: whoever writes a file writes its checksum."""
    (checkpoint / ".metadata").write_bytes(content)
    lines = (checkpoint / MANIFEST_NAME).read_text()
    manifest = json.loads(lines)
    from megatron_ove.checkpoint.manager import _describe_file

    size, checksum = _describe_file(checkpoint / ".metadata")
    for key, entry in manifest["files"].items():
        if key == ".metadata":
            entry |= {"size": size, "crc32": checksum}
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_a_gadget_works_where_nothing_is_done_about_it(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Gadget(tmp_path / "ran")))
    with pytest.raises((AttributeError, TypeError)):
        FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "ran").exists()


def test_no_command_runs_what_an_index_asks_for(
    copied: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, checkpoint = copied
    target = tmp_path / "ran"
    write_index(checkpoint, pickle.dumps(Gadget(target)))
    sentence = "which no index of a checkpoint needs: it was made to run something"
    export = ["convert", "export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "export")]
    for command in (["inspect", str(checkpoint)], export):
        assert main(command) != 0
        assert sentence in capsys.readouterr().err
    for read in (stored_keys, read_metadata, require_data, lambda path: read_tensors(path, "")):
        with pytest.raises(CheckpointError, match=sentence):
            read(checkpoint)
    more = {**data, "train": {**data["train"], "num_steps": NUM_STEPS + 2}}
    with pytest.raises(WorkerError, match=sentence):  # resumes
        run_distributed(walk, 1, {"run": more})
    start = [{"path": str(checkpoint), "parts": ["encoder"]}]
    with pytest.raises(WorkerError, match=sentence):
        run_distributed(walk, 1, {"new": {**data, "run_dir": str(tmp_path / "new"), "init_from": start}})
    assert not target.exists()


def test_objects_are_data(copied: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    _, checkpoint = copied
    require_data(checkpoint)
    metadata = read_metadata(checkpoint)
    (index,) = [one for one in metadata.storage_data if one.fqn.startswith("rng")]
    stream = io.BytesIO()
    torch.save({"torch": Gadget(tmp_path / "ran")}, stream)
    name = metadata.storage_data[index].relative_path
    info = metadata.storage_data[index]
    info.offset, info.length = (checkpoint / name).stat().st_size, len(stream.getvalue())
    with (checkpoint / name).open("ab") as file:
        file.write(stream.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"holds an object 'rng.*' that is more than numbers"):
        require_data(checkpoint)
    require_data(checkpoint, looks_at_objects=False)  # nobody reads it then
    assert not (tmp_path / "ran").exists()


def test_a_history_is_looked_into(copied: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Transformer Engine pickles its history once more, into a tensor of bytes."""
    _, checkpoint = copied
    contents = {
        "plain": pickle.dumps({"scale_fwd": torch.ones(3), "steps": 4}),
        "gadget": pickle.dumps({"scale_fwd": Gadget(tmp_path / "ran")}),
        "nested": pickle.dumps({"scale_fwd": _Reads(torch_pickle(Gadget(tmp_path / "ran")))}),
    }
    for name, content in contents.items():
        metadata = read_metadata(checkpoint)
        (index,) = [one for one in metadata.storage_data if one.fqn.startswith("rng")]
        stream = io.BytesIO()
        torch.save(torch.frombuffer(bytearray(content), dtype=torch.uint8), stream)
        (checkpoint / name).write_bytes(stream.getvalue())
        info = metadata.storage_data.pop(index)
        info.relative_path, info.offset, info.length = name, 0, len(stream.getvalue())
        entry = metadata.state_dict_metadata.pop(index.fqn)
        key = "model.decoder.layers.self_attention._extra_state/shard_0_2"
        metadata.state_dict_metadata[key] = entry
        metadata.storage_data[type(index)(key)] = info
        original = (checkpoint / ".metadata").read_bytes()
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
        if name == "plain":
            require_data(checkpoint)
        else:
            with pytest.raises(CheckpointError, match="is more than numbers"):
                require_data(checkpoint)
        (checkpoint / ".metadata").write_bytes(original)
    assert not (tmp_path / "ran").exists()


class _Reads:
    """Unpickled as torch unpickles a tensor's bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (self.content,)


def torch_pickle(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_files_elsewhere_and_other_forms_are_refused(
    copied: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint = copied
    original = (checkpoint / ".metadata").read_bytes()
    for name in ("../../secret", "/etc/passwd", ".."):
        metadata = pickle.loads(original)
        next(iter(metadata.storage_data.values())).relative_path = name
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="which lies elsewhere"):
            read_metadata(checkpoint)
    (checkpoint / ".metadata").write_bytes(original[: len(original) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_metadata(checkpoint)
    (checkpoint / ".metadata").write_bytes(original)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match="is set, with which torch runs what checkpoints ask for; unset it"):
        require_data(checkpoint)
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr", "common_backend": "torch"}')
    with pytest.raises(CheckpointError, match="names another form than this program writes"):
        require_data(checkpoint)
