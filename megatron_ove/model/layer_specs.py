"""Which modules make up a transformer layer: ours and torch's (`local`), or Transformer Engine's.

Both compute the same function and write the same checkpoint keys. Local layers run anywhere; Transformer Engine adds
fused kernels, flash attention over packs, and FP8.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ove.model.attention import PackedAttention
from megatron_ove.model.drop_path import DropPathLayer
from megatron_ove.model.kernels import EncoderKernels
from megatron_ove.model.linear import LocalColumnParallelLinear, LocalRowParallelLinear
from megatron_ove.model.parameter_names import FUSED_NORMS
from megatron_ove.model.rotation import rotation_of

# megatron-core's submodule fields are annotated more narrowly than what it accepts there.
_RESIDUAL_ADD: Any = get_bias_dropout_add


class SequenceParallelLayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose gradients are summed over the tensor group when each rank sees its part of the sequence.

    megatron-core sums the gradients of parameters that carry `sequence_parallel`; its own fallback for machines without
    Transformer Engine and Apex refuses sequence parallelism instead.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ApexLayerNorm(FusedLayerNorm):
    """Apex's fused LayerNorm, as megatron-core wraps it, made on the model's device in the model's dtype."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        with torch.device(torch.cuda.current_device()):
            super().__init__(config, hidden_size, eps=eps)
        self.to(config.params_dtype)


def build_block_submodules(
    kernels: EncoderKernels, num_layers: int, *, drops_paths: bool = False
) -> TransformerBlockSubmodules:
    """Returns what megatron-core's TransformerBlock is built of: `num_layers` equal layers and the final norm.

    Args:
        kernels: implementations.
        num_layers: of the chunk.
        drops_paths: whether layers leave out branches in training.
    """
    norm: Any = ApexLayerNorm if kernels.norm == "apex" else SequenceParallelLayerNorm
    if kernels.layers == "local":
        layer = _local_layer(norm, _core_attention(kernels))
    else:
        layer = _transformer_engine_layer(_core_attention(kernels))
    if drops_paths:
        layer.module = DropPathLayer
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _core_attention(kernels: EncoderKernels) -> ModuleSpec:
    if kernels.attention == "transformer_engine":
        from megatron_ove.model.engine_attention import EngineAttention as Attention
    elif kernels.attention == "flash":
        from megatron_ove.model.flash_attention import FlashPackedAttention as Attention
    else:
        Attention = PackedAttention  # noqa: N806  # a class
    return ModuleSpec(module=Attention, params={"rotation": rotation_of(kernels.rotation)})


def _local_layer(norm: Any, core_attention: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention(LocalColumnParallelLinear, core_attention, LocalRowParallelLinear),
            self_attn_bda=_RESIDUAL_ADD,
            pre_mlp_layernorm=norm,
            mlp=_mlp(LocalColumnParallelLinear, LocalRowParallelLinear),
            mlp_bda=_RESIDUAL_ADD,
            # Checkpoints carry Transformer Engine's names, so that either kind of layer reads them.
            sharded_state_dict_keys_map={
                separate.removeprefix("."): fused.removeprefix(".") for fused, separate in FUSED_NORMS.items()
            },
        ),
    )


def _transformer_engine_layer(core_attention: ModuleSpec) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=_attention(TELayerNormColumnParallelLinear, core_attention, TERowParallelLinear),
            self_attn_bda=_RESIDUAL_ADD,
            pre_mlp_layernorm=IdentityOp,  # both norms live inside the linear layers that follow them
            mlp=_mlp(TELayerNormColumnParallelLinear, TERowParallelLinear),
            mlp_bda=_RESIDUAL_ADD,
        ),
    )


def _attention(linear_qkv: Any, core_attention: Any, linear_proj: Any) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv, core_attention=core_attention, linear_proj=linear_proj
        ),
    )


def _mlp(linear_fc1: Any, linear_fc2: Any) -> ModuleSpec:
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2))
