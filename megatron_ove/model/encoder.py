"""The vision encoder, or the part of it that one pipeline stage holds.

First stage: patch embedding and the norm before the layers. Every stage: its share of megatron-core's TransformerBlock.
Last stage: the final norm and the attention-pooling head. Positions go to every stage, because rotary angles are made
where they are used; patches are needed on the first only.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_ove.batch import PatchPack
from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.model.attention import PatchSegments, build_segments
from megatron_ove.model.drop_path import draw_factors
from megatron_ove.model.encoder_chunk import EncoderChunk
from megatron_ove.model.initialization import initialize_parameters
from megatron_ove.model.kernels import EncoderKernels, resolve_kernels
from megatron_ove.model.layer_specs import SequenceParallelLayerNorm, build_block_submodules
from megatron_ove.model.patch_embed import PatchEmbed
from megatron_ove.model.pooling import AttentionPoolingHead
from megatron_ove.model.rotary import inverse_frequencies, rotary_angles
from megatron_ove.model.transformer_config import build_transformer_config
from megatron_ove.outputs import VisionFeatures
from megatron_ove.parallel.topology import ParallelTopology


class VisionEncoder(EncoderChunk):
    """One model chunk of the OneVision-Encoder."""

    def __init__(
        self,
        config: EncoderConfig,
        topology: ParallelTopology,
        transformer_config: TransformerConfig,
        *,
        kernels: EncoderKernels,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=transformer_config)
        self.encoder_config, self.vp_stage = config, vp_stage
        self.pre_process, self.post_process = topology.is_first_chunk(vp_stage), topology.is_last_chunk(vp_stage)
        self.pg_collection, self.tp_group = topology.process_groups, topology.tensor_group
        self.layer_offset = get_transformer_layer_offset(transformer_config, vp_stage, topology.pipeline_rank)
        time, height, width = inverse_frequencies(config.head_dim, config.rope_theta)
        self._frequencies = (time.to(topology.device), height.to(topology.device), width.to(topology.device))
        placement = {"device": topology.device, "dtype": transformer_config.params_dtype}
        if self.pre_process:
            self.patch_embed = PatchEmbed(config.patch_size, config.hidden_size, **placement)
            # Under sequence parallelism each rank embeds its own share of the patches.
            self.patch_embed.weight.sequence_parallel = transformer_config.sequence_parallel
            self.layernorm_pre = SequenceParallelLayerNorm(
                transformer_config, config.hidden_size, eps=config.layer_norm_epsilon
            )
        num_layers = get_num_layers_to_build(transformer_config, vp_stage=vp_stage, pp_rank=topology.pipeline_rank)
        self.decoder = TransformerBlock(  # "decoder" is where megatron-core's schedules look for layers
            config=transformer_config,
            spec=build_block_submodules(kernels, num_layers, drops_paths=config.drop_path > 0),
            post_layer_norm=config.has_final_norm,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=topology.process_groups,
            vp_stage=vp_stage,
        )
        self.head = AttentionPoolingHead(config, **placement) if self.post_process and config.use_head else None
        for parameter in self.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        self.register_load_state_dict_post_hook(_extra_state_may_be_missing)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Takes what the previous stage sent: [P(/tp under sequence parallelism), 1, h]."""
        received: Any = input_tensor[0] if isinstance(input_tensor, list) else input_tensor  # None on the first stage
        self.decoder.set_input_tensor(received)

    def forward(self, pack: PatchPack) -> Tensor | VisionFeatures:
        """Encodes one microbatch.

        Args:
            pack: `patches` may be None off the first chunk.

        Returns:
            `VisionFeatures` on the last chunk, without `pooled` if the encoder has no head; hidden states [P, 1, h], or
            [P/tp, 1, h] under sequence parallelism, elsewhere.
        """
        angles = rotary_angles(pack.positions, self._frequencies)  # [P, d]
        segments = build_segments(pack.cu_seqlens, angles, self.config.params_dtype)
        if self.training and self.encoder_config.drop_path:
            segments.branch_factors = self._branch_factors(pack)
        hidden = self._embed(pack) if self.pre_process else None
        if hidden is not None and self.training and torch.is_grad_enabled() and not hidden.requires_grad:
            # The embedding is frozen. Recomputed layers whose input wants no gradient would give their weights none.
            hidden.requires_grad_(self.encoder_config.recompute == "full")
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=segments)  # [P(/tp), 1, h]
        return self._features(hidden, pack, segments) if self.post_process else hidden

    def _branch_factors(self, pack: PatchPack) -> dict[int, Tensor]:
        """Returns what the branches of this chunk's layers count for this rank's tokens."""
        if pack.seeds is None:
            raise ValueError("encoder.drop_path draws from the seeds of samples, and the pack has none")
        first, config = self.layer_offset, self.encoder_config
        drawn = draw_factors(
            pack.seeds,
            range(first, first + len(self.decoder.layers)),
            num_layers=config.num_layers,
            rate=config.drop_path,
            lengths=pack.cu_seqlens.diff(),
            num_tokens=pack.num_patches,
        )
        if self.config.sequence_parallel:
            size, rank = self.tp_group.size(), self.tp_group.rank()
            drawn = {layer: factors.chunk(size, dim=1)[rank] for layer, factors in drawn.items()}
        dtype = self.config.params_dtype
        return {layer: x.to(pack.positions.device, dtype, non_blocking=True) for layer, x in drawn.items()}

    def _embed(self, pack: PatchPack) -> Tensor:
        """Returns [P, 1, h], or this rank's [P/tp, 1, h] under sequence parallelism."""
        patches = pack.patches
        if patches is None:
            raise ValueError("the first model chunk got a pack without patches")
        if self.config.sequence_parallel:
            size, rank = self.tp_group.size(), self.tp_group.rank()
            if patches.shape[0] % size:
                raise ValueError(f"{patches.shape[0]} patches cannot be split evenly over {size} tensor-parallel ranks")
            patches = patches.chunk(size)[rank]
        return self.layernorm_pre(self.patch_embed(patches)).unsqueeze(1)

    def _features(self, hidden: Tensor, pack: PatchPack, segments: PatchSegments) -> VisionFeatures:
        tokens = hidden
        if self.config.sequence_parallel:
            # Whatever follows is replicated, so every rank already has the whole gradient: its backward only slices.
            tokens = gather_from_sequence_parallel_region(hidden, False, group=self.tp_group)  # [P, 1, h]
        pooled = None if self.head is None else self.head(tokens.squeeze(1), segments.sample_runs)  # [n, h]
        return VisionFeatures(tokens, pack.cu_seqlens, pack.grids, pack.sample, pooled)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns the state for megatron-core's distributed checkpoints; readable under any layout and layer spec.

        Transformer Engine's extra state is left out unless it holds something, the scaling history of `fp8: delayed`,
        so that checkpoints of local layers and of Transformer Engine layers have the same keys.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.encoder_config.fp8 == "delayed":
            return state
        return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _extra_state_may_be_missing(module: torch.nn.Module, incompatible_keys: Any) -> None:
    """Transformer Engine's layers ask for FP8 scaling history even without FP8; without any they start a fresh one."""
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if not name.endswith("_extra_state")]


def build_encoder(config: EncoderConfig, topology: ParallelTopology, *, dtype: torch.dtype, seed: int) -> VisionEncoder:
    """Builds and initialises a whole encoder, or a stage without a virtual pipeline, on the topology's device.

    Its gradients are torch's own; for training under DistributedDataParallel use `build_encoder_chunks`.

    Args:
        config: the encoder.
        topology: where this process stands.
        dtype: of parameters and activations.
        seed: of the initial weights; equal seeds give equal weights under every layout.

    Raises:
        ConfigError: the configuration cannot be built here.
    """
    kernels = resolve_kernels(config, topology.device, dtype, has_gradient_buffers=False)
    shared = build_transformer_config(config, topology, dtype=dtype, kernels=kernels)
    return _build_chunk(config, topology, shared, kernels, seed=seed, vp_stage=None)


def build_encoder_chunks(
    config: EncoderConfig,
    topology: ParallelTopology,
    *,
    dtype: torch.dtype,
    seed: int,
    has_gradient_buffers: bool = False,
) -> list[VisionEncoder]:
    """Builds every model chunk of this rank, one without a virtual pipeline, all sharing one TransformerConfig.

    Args:
        config, topology, dtype, seed: as for `build_encoder`.
        has_gradient_buffers: whether the chunks will be wrapped in megatron-core's DistributedDataParallel before their
            first forward pass, so that weight gradients may go straight to its buffers.
    """
    kernels = resolve_kernels(config, topology.device, dtype, has_gradient_buffers=has_gradient_buffers)
    shared = build_transformer_config(config, topology, dtype=dtype, kernels=kernels)
    size = topology.virtual_pipeline_size
    stages = [None] if size is None else range(size)
    return [_build_chunk(config, topology, shared, kernels, seed=seed, vp_stage=stage) for stage in stages]


def _build_chunk(
    config: EncoderConfig,
    topology: ParallelTopology,
    transformer_config: TransformerConfig,
    kernels: EncoderKernels,
    *,
    seed: int,
    vp_stage: int | None,
) -> VisionEncoder:
    encoder = VisionEncoder(config, topology, transformer_config, kernels=kernels, vp_stage=vp_stage)
    initialize_parameters(
        encoder.named_parameters(),
        seed=seed,
        initializer_range=config.initializer_range,
        layer_offset=encoder.layer_offset,
        tensor_rank=topology.tensor_rank,
        tensor_size=topology.tensor_size,
    )
    return encoder
