"""An encoder of its own kind: layers of two linear maps that see one patch each, and the mean as pooled output."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import sharded_state_dict_default
from pydantic import Field
from torch import Tensor, nn

from megatron_ove.batch import PatchPack
from megatron_ove.config.encoder import EncoderSection
from megatron_ove.kinds import EncoderKind
from megatron_ove.model.encoder_chunk import EncoderChunk
from megatron_ove.model.initialization import initialize_parameters
from megatron_ove.outputs import VisionFeatures
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.planning.footprint import EncoderFootprint
from megatron_ove.planning.parameters import Parameter


class MixerConfig(EncoderSection):
    """Sizes."""

    kind: Literal["mixer"]
    ffn_hidden_size: Annotated[int, Field(gt=0)] = 64


class MixerLayer(nn.Module):
    """x + W2 gelu(W1 x)."""

    def __init__(self, config: TransformerConfig, topology: ParallelTopology) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        common = {"config": config, "init_method": lambda weight: weight, "tp_group": topology.tensor_group}
        self.fc1 = ColumnParallelLinear(hidden, ffn, gather_output=False, bias=True, **common)
        self.fc2 = RowParallelLinear(ffn, hidden, input_is_parallel=True, bias=True, skip_bias_add=False, **common)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)[0]))[0]


class Mixer(EncoderChunk):
    """One chunk."""

    def __init__(self, section: MixerConfig, topology: ParallelTopology, config: TransformerConfig, vp_stage) -> None:
        super().__init__(config=config)
        self.vp_stage, self._group = vp_stage, topology.tensor_group
        self.pre_process, self.post_process = topology.is_first_chunk(vp_stage), topology.is_last_chunk(vp_stage)
        self.layer_offset = get_transformer_layer_offset(config, vp_stage, topology.pipeline_rank)
        count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=topology.pipeline_rank)
        if self.pre_process:
            self.embed = nn.Linear(3 * section.patch_size**2, section.hidden_size, dtype=config.params_dtype)
        layers = nn.ModuleList(MixerLayer(config, topology) for _ in range(count))
        self.decoder = nn.ModuleDict({"layers": layers})
        for parameter in self.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        self._received: Any = None

    def set_input_tensor(self, input_tensor: Any) -> None:
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, pack: PatchPack) -> Tensor | VisionFeatures:
        hidden = self._received
        if self.pre_process:
            assert pack.patches is not None
            pixels = pack.patches.to(self.embed.weight.dtype) / 255
            hidden = self.embed(pixels).unsqueeze(1)  # [P, 1, h]
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(hidden, group=self._group)
        for layer in self.decoder["layers"]:
            hidden = layer(hidden)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, False, group=self._group)
        parts = hidden.squeeze(1)[: int(pack.cu_seqlens[-1])].split(pack.cu_seqlens.diff().tolist())
        pooled = torch.stack([part.mean(dim=0) for part in parts]) if parts else hidden.squeeze(1)[:0]
        return VisionFeatures(hidden, pack.cu_seqlens, pack.grids, pack.sample, pooled)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        state = {}
        if self.pre_process:
            state |= sharded_state_dict_default(self.embed, f"{prefix}embed.", metadata=metadata, tp_group=self._group)
        for index, layer in enumerate(self.decoder["layers"]):
            for name, module in layer.named_children():
                here = f"{prefix}decoder.layers.{index}.{name}."
                part = sharded_state_dict_default(module, here, metadata=metadata, tp_group=self._group)
                there = f"{prefix}decoder.layers.{index + self.layer_offset}.{name}."
                replace_prefix_for_sharding(part, here, there)
                state |= part
        return state


def build(section, topology, *, dtype, seed, has_gradient_buffers=False):
    """Builds this rank's chunks."""
    del has_gradient_buffers
    config = TransformerConfig(
        num_layers=section.num_layers,
        hidden_size=section.hidden_size,
        num_attention_heads=topology.tensor_size,
        ffn_hidden_size=section.ffn_hidden_size,
        tensor_model_parallel_size=topology.tensor_size,
        pipeline_model_parallel_size=topology.pipeline_size,
        virtual_pipeline_model_parallel_size=topology.virtual_pipeline_size,
        sequence_parallel=topology.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        overlap_p2p_comm=topology.virtual_pipeline_size is not None,
        batch_p2p_comm=topology.virtual_pipeline_size is None,
    )
    stages = [None] if topology.virtual_pipeline_size is None else range(topology.virtual_pipeline_size)
    chunks = [Mixer(section, topology, config, stage) for stage in stages]
    for chunk in chunks:
        initialize_parameters(
            chunk.named_parameters(),
            seed=seed,
            initializer_range=section.initializer_range,
            layer_offset=chunk.layer_offset,
            tensor_rank=topology.tensor_rank,
            tensor_size=topology.tensor_size,
        )
    return chunks


class _Footprint(EncoderFootprint):
    def parameters(self, config, layout, *, stage, chunk):
        hidden, ffn, area = config.encoder.hidden_size, config.encoder.ffn_hidden_size, 3 * config.encoder.patch_size**2
        share = ffn // layout.tensor
        found = []
        if layout.is_first(stage, chunk):
            found += [Parameter("embed.weight", (hidden, area)), Parameter("embed.bias", (hidden,))]
        for _ in layout.layers_of(stage, chunk):
            found += [Parameter("fc1.weight", (share, hidden), True), Parameter("fc1.bias", (share,), True)]
            found += [Parameter("fc2.weight", (hidden, share), True), Parameter("fc2.bias", (hidden,))]
        return found


def _operations(section, *, tokens, samples, squares):
    return {"layers": 3 * 2 * tokens * section.num_layers * 2 * section.hidden_size * section.ffn_hidden_size}


ENCODERS = {
    "mixer": EncoderKind(
        config=MixerConfig,
        build=build,
        footprint=_Footprint,
        operations=_operations,
        before_layers=("encoder.embed",),
        identity=("hidden_size", "num_layers", "ffn_hidden_size", "patch_size"),
    )
}
