"""Whole tensors from and to checkpoint folders, on one process: no model, no process group, no device is needed.

megatron-core stores the layers' equal tensors stacked, [layers, ...] under one key without the layer's number, and each
norm under its Transformer Engine name, whatever layers wrote it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ove.checkpoint.manager import read_common_state
from megatron_ove.checkpoint.manifest import (
    checksum_problem,
    data_files,
    file_crc32,
    read_manifest,
    structural_problem,
    write_manifest,
)
from megatron_ove.checkpoint.trust import TrustedReader, read_metadata
from megatron_ove.config.encoder import EncoderConfig, EncoderSection
from megatron_ove.config.upgrade import CONFIG_VERSION
from megatron_ove.convert.mapping import check_state, mcore_shapes
from megatron_ove.errors import CheckpointError, ConfigError
from megatron_ove.kinds import kinds_of
from megatron_ove.model.parameter_names import transformer_engine_name
from megatron_ove.new_folder import new_folder

_MODEL_PREFIX, _AVERAGE_PREFIX = "model.", "average."
_LAYER_NUMBER = re.compile(r"(?<=decoder\.layers\.)(\d+)\.")


def read_checkpoint_facts(checkpoint_dir: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Returns the plain values of a checkpoint (step, config, ...), after checking that the folder is whole.

    Args:
        checkpoint_dir: a folder like runs/NAME/checkpoints/step_00000100.
        verify: whether every file's checksum is compared; else only names and sizes.

    Raises:
        CheckpointError: it is not a finished checkpoint, or a file has changed since it was written.
    """
    path = Path(checkpoint_dir)
    problem = structural_problem(path)
    if problem is None and verify:
        files = read_manifest(path)["files"].items()
        problem = next((text for name, entry in files if (text := checksum_problem(path, name, entry))), None)
    if problem is not None:
        raise CheckpointError(
            f"{path} cannot be used as a checkpoint: {problem}; name a finished folder like "
            "runs/NAME/checkpoints/step_00000100"
        )
    return read_common_state(path)


def encoder_config_of(facts: Mapping[str, Any], checkpoint_dir: str | Path) -> EncoderSection:
    """Returns the encoder of a checkpoint's plain values.

    Raises:
        CheckpointError: there is none, or another version of this program wrote it.
    """
    try:
        section = facts["config"]["encoder"]
        return kinds_of(facts["config"]).encoders[section["kind"]].config.model_validate(section)
    except (ConfigError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint_dir} has no encoder configuration that this version understands "
            f"({_first_line(error)}); convert it with the version that wrote it"
        ) from error


def encoder_state_from_checkpoint(
    checkpoint_dir: str | Path, *, verify: bool = True, averaged: bool = False
) -> tuple[dict[str, Tensor], EncoderConfig]:
    """Reads the encoder's weights, whatever parallel layout wrote them.

    Args:
        checkpoint_dir: a checkpoint folder.
        verify: whether every file's checksum is compared first.
        averaged: whether to read the moving average of the weights instead of the weights.

    Returns:
        Names of a one-process `VisionEncoder` with local layers to whole tensors on the CPU, in the stored dtype; and
        the encoder's configuration.

    Raises:
        CheckpointError: the folder is not a whole checkpoint, or its tensors are not those of its configuration.
    """
    config = encoder_config_of(read_checkpoint_facts(checkpoint_dir, verify=verify), checkpoint_dir)
    if not isinstance(config, EncoderConfig):
        raise CheckpointError(
            f"the checkpoint {checkpoint_dir} holds an encoder of kind {config.kind}, and only those of kind onevision "
            "have names and a model that are published"
        )
    stored = read_weights(checkpoint_dir, averaged=averaged)
    places = {name: _stored_place(name) for name in mcore_shapes(config)}
    state = {
        name: stored[key] if layer is None else stored[key][layer]
        for name, (key, layer) in places.items()
        if key in stored and (layer is None or layer < stored[key].shape[0])
    }
    # A stack that is too high, or a key that no parameter has, would go unnoticed otherwise.
    state |= {key: stored[key] for key in stored.keys() - {key for key, _ in places.values()}}
    state |= {
        f"{key}[{config.num_layers}:]": stored[key]
        for key, layer in set(places.values())
        if layer == 0 and key in stored and stored[key].shape[0] > config.num_layers
    }
    check_state(state, mcore_shapes(config), what=f"the checkpoint {checkpoint_dir}")
    return state, config


def read_weights(checkpoint_dir: str | Path, *, averaged: bool) -> dict[str, Tensor]:
    """Returns the encoder's weights, or their moving average, by the keys of the weights.

    Raises:
        CheckpointError: the files cannot be read, or hold no average.
    """
    prefix = _AVERAGE_PREFIX if averaged else ""
    found = read_tensors(checkpoint_dir, prefix + _MODEL_PREFIX)
    if averaged and not found:
        raise CheckpointError(
            f"the checkpoint {checkpoint_dir} holds no averaged weights, because its run had train.ema_decay = null; "
            "export the weights themselves"
        )
    return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


def stored_keys(checkpoint_dir: str | Path) -> frozenset[str]:
    """Returns the keys of all tensors of a checkpoint.

    Raises:
        CheckpointError: its index cannot be read.
    """
    try:
        return frozenset(read_metadata(checkpoint_dir).state_dict_metadata)
    except (OSError, CheckpointException, RuntimeError) as error:
        raise CheckpointError(
            f"the index of the checkpoint {checkpoint_dir} cannot be read ({_first_line(error)}); use another one"
        ) from error


def read_tensors(checkpoint_dir: str | Path, prefix: str) -> dict[str, Tensor]:
    """Returns every tensor whose key begins with `prefix`: stored key to whole tensor on the CPU.

    Raises:
        CheckpointError: the files cannot be read.
    """
    reader = TrustedReader(str(checkpoint_dir))
    try:
        entries = reader.read_metadata().state_dict_metadata
        state: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in entries.items()
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        if state:
            with _one_process():
                torch_checkpoint.load(state, storage_reader=reader, no_dist=True)
    except (OSError, CheckpointException, RuntimeError) as error:
        raise CheckpointError(
            f"the tensors of the checkpoint {checkpoint_dir} cannot be read ({_first_line(error)}); use another one"
        ) from error
    return state


def write_encoder_checkpoint(
    checkpoint_dir: str | Path, state: Mapping[str, Tensor], config: EncoderConfig, *, facts: Mapping[str, Any]
) -> Path:
    """Writes a checkpoint that holds an encoder and nothing else, for initialising runs.

    Args:
        checkpoint_dir: new folder; it appears only when it is complete.
        state: full tensors of a one-process `VisionEncoder`.
        config: the encoder.
        facts: plain values to store besides step 0 and the configuration.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder exists, the disk is full, or the state does not fit `config`.
    """
    check_state(state, mcore_shapes(config), what="the encoder state")
    stacks: dict[str, list[Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for name in mcore_shapes(config):  # layers in ascending order
        key, layer = _stored_place(name)
        if layer is None:
            tensors[key] = state[name]
        else:
            stacks.setdefault(key, []).append(state[name])
    tensors |= {key: torch.stack(layers) for key, layers in stacks.items()}
    stored = {"config_version": CONFIG_VERSION, "encoder": config.model_dump(mode="json")}
    common = {"step": 0, "config": stored, **facts}
    with new_folder(checkpoint_dir, error=CheckpointError) as partial:
        writer = torch_checkpoint.FileSystemWriter(partial, sync_files=True)
        with _one_process():
            torch_checkpoint.save(tensors, storage_writer=writer, no_dist=True)
        torch.save(common, partial / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        files = {name: ((partial / name).stat().st_size, file_crc32(partial / name)) for name in data_files(partial)}
        write_manifest(partial, step=0, files=files, extra={"content": "encoder"})
    return Path(checkpoint_dir)


@contextmanager
def _one_process() -> Iterator[None]:
    """Keeps torch from remarking on every call that it was told to work in one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _stored_place(name: str) -> tuple[str, int | None]:
    """Returns the stored key of a parameter, and its index in the stack under this key (None = not stacked)."""
    return layer_in_stack(_MODEL_PREFIX + transformer_engine_name(name))


def layer_in_stack(key: str) -> tuple[str, int | None]:
    """Returns the key that layers are stacked under, and the layer; None for the layer of a key that names none."""
    match = _LAYER_NUMBER.search(key)
    return (key, None) if match is None else (_LAYER_NUMBER.sub("", key), int(match[1]))


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return _first_line(next(iter(error.failures.values()))[0])
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
