"""The encoders that are compared: ours, and two plain ones with the same weights on the same pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from plain_vit import Attention, PlainVit, normalize_pixels
from torch import Tensor

from megatron_ove.batch import PatchPack
from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.config.yaml_file import read_yaml_mapping
from megatron_ove.convert.mapping import to_hf
from megatron_ove.data.patchify import grid_positions, write_patches
from megatron_ove.model.encoder import VisionEncoder, build_encoder
from megatron_ove.parallel.topology import ParallelTopology, initialize_topology

_SIZES = Path(__file__).parents[2] / "examples/_base"
SIZES = tuple(sorted(path.stem.removeprefix("encoder_") for path in _SIZES.glob("encoder_*.yaml")))


@dataclass(frozen=True)
class Workload:
    """What every contender is given.

    Attributes:
        size: a published size: base, large, huge.
        num_layers: of the encoder, None = as published.
        resolution: side of the square pictures.
        batch_size: pictures.
        dtype: of weights and activations, float32 or bfloat16.
    """

    size: str = "large"
    num_layers: int | None = None
    resolution: int = 448
    batch_size: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def encoder_config(self) -> EncoderConfig:
        return encoder_config(self.size, num_layers=self.num_layers)

    def pictures(self) -> Tensor:
        """Returns [b, 3, H, H] uint8."""
        generator = torch.Generator().manual_seed(1)
        shape = self.batch_size, 3, self.resolution, self.resolution
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    def output_weights(self, hidden: int) -> Tensor:
        """Returns fp32 [b, h]: the loss is the pooled embeddings' product with these."""
        return torch.randn(self.batch_size, hidden, generator=torch.Generator().manual_seed(2))


def encoder_config(size: str, *, num_layers: int | None = None) -> EncoderConfig:
    """Returns a published size with local layers, with another number of layers if one is given."""
    fields = read_yaml_mapping(_SIZES / f"encoder_{size}.yaml")["encoder"] | {"layer_spec": "local"}
    return EncoderConfig(**(fields if num_layers is None else fields | {"num_layers": num_layers}))


def picture_pack(pictures: Tensor, patch_size: int) -> PatchPack:
    """Packs [b, 3, H, W] uint8."""
    count, _, height, width = pictures.shape
    rows, columns = height // patch_size, width // patch_size
    patches = torch.empty(count, rows * columns, 3 * patch_size**2, dtype=torch.uint8)
    for picture, target in zip(pictures, patches, strict=True):
        write_patches(picture.permute(1, 2, 0).contiguous(), target, patch_size)
    positions = torch.from_numpy(grid_positions(rows, columns)).repeat(count, 1)
    cu_seqlens = torch.arange(count + 1, dtype=torch.int32) * (rows * columns)
    return PatchPack.of_whole_samples(positions, cu_seqlens, patches.flatten(0, 1))


def seeded_encoder(config: EncoderConfig, topology: ParallelTopology, dtype: torch.dtype) -> VisionEncoder:
    """Returns ours with the weights that all contenders start from; biases are moved off 0, so that they count."""
    encoder = build_encoder(config, topology, dtype=dtype, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.dim() == 1:
                parameter += (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return encoder


def plain_encoder(ours: VisionEncoder, attention: Attention) -> PlainVit:
    """Returns a plain one with the same weights."""
    config = ours.encoder_config
    with torch.device("meta"):
        plain = PlainVit(config, attention)
    plain.load_state_dict(to_hf(ours.state_dict(), config), assign=True)
    return plain


def _compared(pooled: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what contenders are compared by: features; gradients of the first layer and of all that is no layer."""
    chosen = {name: value for name, value in gradients.items() if ".layers." not in name or ".layers.0." in name}
    return {name: value.detach().float().cpu() for name, value in {"pooled": pooled, **chosen}.items()}


class OurEncoder:
    """Ours: megatron-core's layers, one rank, all pictures in one pack."""

    def __init__(self, work: Workload, topology: ParallelTopology) -> None:
        config = work.encoder_config()
        self.encoder = seeded_encoder(config, topology, work.torch_dtype)
        self.pack = picture_pack(work.pictures(), config.patch_size).to(topology.device)
        self._weights = work.output_weights(config.hidden_size).to(topology.device)
        self._config = config

    def outputs(self) -> dict[str, Tensor]:
        """Returns the pooled embeddings and, under the published names, gradients."""
        pooled = self._forward_backward()
        gradients = {name: p.grad for name, p in self.encoder.named_parameters() if p.grad is not None}
        return _compared(pooled, to_hf(gradients, self._config))

    def prepare(self) -> None:
        """The same batch every time."""

    def step(self) -> dict[str, float]:
        """Forward and backward."""
        self._forward_backward()
        return {}

    def _forward_backward(self) -> Tensor:
        self.encoder.zero_grad()
        pooled = self.encoder(self.pack).pooled
        (pooled.float() * self._weights).sum().backward()
        return pooled


class PlainEncoder:
    """A plain one: a dense batch of equal pictures, normalised beforehand."""

    def __init__(self, work: Workload, attention: Attention, topology: ParallelTopology) -> None:
        config = work.encoder_config()
        self.encoder = plain_encoder(seeded_encoder(config, topology, work.torch_dtype), attention)
        self.pixels = normalize_pixels(work.pictures().to(topology.device))[:, None].to(work.torch_dtype)
        side = work.resolution // config.patch_size
        positions = torch.from_numpy(grid_positions(side, side))
        self.positions = positions.expand(work.batch_size, -1, -1).to(topology.device)
        self._weights = work.output_weights(config.hidden_size).to(topology.device)

    def outputs(self) -> dict[str, Tensor]:
        """Returns the pooled embeddings and gradients."""
        pooled = self._forward_backward()
        return _compared(pooled, {name: p.grad for name, p in self.encoder.named_parameters() if p.grad is not None})

    def prepare(self) -> None:
        """The same batch every time."""

    def step(self) -> dict[str, float]:
        """Forward and backward."""
        self._forward_backward()
        return {}

    def _forward_backward(self) -> Tensor:
        self.encoder.zero_grad()
        pooled = self.encoder(self.pixels, self.positions)
        (pooled.float() * self._weights).sum().backward()
        return pooled


def build_contender(name: Literal["ours", "eager", "sdpa"], work: Workload) -> OurEncoder | PlainEncoder:
    """Builds `ours`, `eager` or `sdpa` in a process of its own."""
    topology = initialize_topology(ParallelConfig.model_validate({"device": work.device}), seed=0)
    return OurEncoder(work, topology) if name == "ours" else PlainEncoder(work, name, topology)
