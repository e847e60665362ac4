"""A frozen encoder on the last pipeline stage, split over its tensor ranks: in no buffer, optimizer or checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ove.batch import PatchPack
from megatron_ove.checkpoint.manifest import MANIFEST_NAME, checkpoints_at, structural_problem
from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.reconstruction import TeacherConfig
from megatron_ove.convert.checkpoint_files import (
    encoder_config_of,
    encoder_state_from_checkpoint,
    read_checkpoint_facts,
)
from megatron_ove.convert.exchange import OneVisionExchange
from megatron_ove.convert.hf_config import from_hf_config
from megatron_ove.data.native_size import native_grids
from megatron_ove.data.patchify import grid_positions
from megatron_ove.errors import CheckpointError
from megatron_ove.model.encoder import build_encoder
from megatron_ove.model.initialization import fill_parameters
from megatron_ove.objectives.reconstruction.pictures import resample_features, scale_patches
from megatron_ove.objectives.reconstruction.segment_groups import Grid, SegmentGroup, SegmentGroups
from megatron_ove.outputs import VisionFeatures
from megatron_ove.parallel.topology import ParallelTopology

_LOOKED_AT, _BLOCK = 256, 4096
"""Blocks of a file that its fingerprint is made of, and their bytes."""

# How it was trained says nothing about how it runs here.
_PLAIN: dict[str, Any] = {
    **{"layer_spec": "auto", "attention_backend": "auto", "compile": False, "recompute": "none", "fp8": "off"},
    **{"fp8_skip_first_layers": 0, "fp8_skip_last_layers": 0, "drop_path": 0.0, "mcore_overrides": {}},
}


def resolve_teacher(config: TeacherConfig) -> TeacherConfig:
    """Returns the section with the very folder that holds the weights, and their fingerprint.

    Raises:
        CheckpointError: there is no usable teacher.
    """
    path = Path(config.path)
    if (path / "config.json").is_file():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"teacher.path = {path} holds no *.safetensors; name a whole HuggingFace folder")
        marks = [f"{file.name} {_sampled_digest(file)}" for file in files]
    else:
        found = next((one for one in checkpoints_at(path) if structural_problem(one) is None), None)
        if found is None:
            raise CheckpointError(
                f"teacher.path = {path} holds no finished checkpoint and is no HuggingFace folder; name a run that has "
                "saved one, a checkpoint, or an export"
            )
        path = found
        marks = [(path / MANIFEST_NAME).read_text(encoding="utf-8")]
    digest = hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16]
    if config.fingerprint not in (None, digest):
        raise CheckpointError(
            f"teacher.path = {path} has other weights than the run began with (fingerprint {digest}, not "
            f"{config.fingerprint}); put them back, or begin a new run"
        )
    return config.model_copy(update={"path": str(path), "fingerprint": digest})


def _sampled_digest(file: Path) -> str:
    """Returns a digest of a file's size, beginning and evenly spread blocks: every rank looks at every start, and a
    whole encoder would be a GB each time."""
    size, digest = file.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with file.open("rb") as stream:
        for number in range(_LOOKED_AT):
            stream.seek(number * size // _LOOKED_AT)
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def read_teacher_config(path: str) -> EncoderConfig:
    """Returns the encoder of a resolved teacher; reads no weights of a published folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{folder}/config.json cannot be read ({error}); copy the folder again") from error
        return from_hf_config(values, origin=f"{folder}/config.json")
    section = encoder_config_of(read_checkpoint_facts(folder, verify=False), folder)
    if not isinstance(section, EncoderConfig):
        raise CheckpointError(
            f"{folder} holds an encoder of kind {section.kind}, and a teacher is one of kind onevision"
        )
    return section


def _read(path: str) -> tuple[dict[str, Tensor], EncoderConfig]:
    if (Path(path) / "config.json").is_file():
        weights, section = OneVisionExchange().read(path)
        assert isinstance(section, EncoderConfig)
        return weights, section
    return encoder_state_from_checkpoint(path, verify=False)  # its manifest is part of the fingerprint


class Teacher:
    """A plain object, so that wrappers, optimizer and checkpoints, which walk over modules, do not see the encoder.

    Attributes:
        width: of its features.
    """

    def __init__(self, config: TeacherConfig, topology: ParallelTopology, dtype: torch.dtype) -> None:
        """Reads the weights and builds the encoder on this rank.

        Args:
            config: resolved.
            topology: this rank's place.
            dtype: of weights and activations.

        Raises:
            CheckpointError: it cannot be read.
        """
        state, section = _read(config.path)
        alone = dataclasses.replace(
            topology,
            pipeline_size=1,
            pipeline_rank=0,
            virtual_pipeline_size=None,
            first_stage_layers=None,
            last_stage_layers=None,
        )
        self.encoder = build_encoder(section.model_copy(update=_PLAIN), alone, dtype=dtype, seed=0)
        fill_parameters(
            self.encoder.named_parameters(),
            lambda name, shape: state[name].reshape(shape),
            layer_offset=0,
            tensor_rank=topology.tensor_rank,
            tensor_size=topology.tensor_size,
        )
        self.encoder.requires_grad_(False).eval()
        self.width = section.hidden_size
        self._patch_size, self._most = section.patch_size, config.max_patches
        self._multiple = topology.tensor_size if topology.sequence_parallel else 1

    def shown(self, grid: Grid) -> Grid:
        """Returns the grid at which the teacher sees a picture of the student's grid."""
        frames, rows, columns = grid
        if self._most is None or frames != 1 or rows * columns <= self._most:
            return grid
        smaller = native_grids(np.array([rows]), np.array([columns]), 1, self._most)[0].tolist()
        return (1, int(smaller[0]), int(smaller[1]))

    @torch.no_grad()
    def features(self, pack: PatchPack, groups: SegmentGroups) -> Tensor:
        """Returns [n, e] fp32, features of the patches of all groups, one group after the other.

        Args:
            pack: with patches, on the device.
            groups: on the device; at least one.
        """
        assert pack.patches is not None
        patches, positions, lengths = [], [], []
        for group in groups.groups:
            patches.append(self._shown_patches(pack.patches, group))
            positions.append(self._shown_positions(pack.positions, group))
            lengths += [len(patches[-1]) // group.count] * group.count
        rest = -sum(lengths) % self._multiple
        if rest:
            patches.append(pack.patches.new_zeros(rest, pack.patches.shape[1]))
            positions.append(pack.positions.new_zeros(rest, 3))
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        shown = PatchPack.of_whole_samples(torch.cat(positions), bounds, torch.cat(patches))
        output = self.encoder(shown)
        assert isinstance(output, VisionFeatures)
        tokens, found, start = output.tokens.squeeze(1), [], 0
        for group, own in zip(groups.groups, patches, strict=False):
            part = tokens[start : start + len(own)]
            if group.is_scaled:
                part = resample_features(part, group.count, group.shown[1:], group.grid[1:])
            found.append(part.float())
            start += len(own)
        return torch.cat(found)

    def _shown_patches(self, patches: Tensor, group: SegmentGroup) -> Tensor:
        own = patches[group.rows]
        return scale_patches(own, group.count, group.grid[1:], group.shown[1:]) if group.is_scaled else own

    def _shown_positions(self, positions: Tensor, group: SegmentGroup) -> Tensor:
        if not group.is_scaled:
            return positions[group.rows]
        grid = torch.from_numpy(grid_positions(*group.shown[1:])).repeat(group.count, 1)
        return grid.to(positions.device, non_blocking=True)
