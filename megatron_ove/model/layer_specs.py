"""Which modules make up a transformer layer: ours and torch's (`local`), or Transformer Engine's.

Both compute the same function and write the same checkpoint keys. Local layers run anywhere; Transformer Engine adds
fused kernels, flash attention over packs, and FP8.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.errors import ConfigError
from megatron_ove.model.attention import PackedAttention
from megatron_ove.model.rotary import rotate
from megatron_ove.model.transformer_config import LayerSpecKind

logger = logging.getLogger(__name__)

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


def resolve_layer_spec(encoder: EncoderConfig, device: torch.device) -> LayerSpecKind:
    """Decides which layers to build, and says so when `auto` falls back.

    Raises:
        ConfigError: Transformer Engine was asked for and cannot be used here.
    """
    if encoder.layer_spec == "local":
        return "local"
    obstacle = _transformer_engine_obstacle(device)
    if obstacle is None:
        return "transformer_engine"
    if encoder.layer_spec == "transformer_engine":
        raise ConfigError(
            f"encoder.layer_spec = transformer_engine, but {obstacle}; install the gpu extra on a machine with a CUDA "
            "device, or set encoder.layer_spec: auto to use local layers"
        )
    # On a CPU nothing is lost; on a GPU speed and FP8 are.
    level = logging.WARNING if device.type == "cuda" else logging.INFO
    logger.log(
        level,
        "encoder.layer_spec = auto uses local layers, because %s; fused kernels, flash attention over packs and FP8 "
        "are not available",
        obstacle,
    )
    return "local"


def _transformer_engine_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "this run is on the CPU and Transformer Engine needs CUDA"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    return None


def build_block_submodules(kind: LayerSpecKind, num_layers: int) -> TransformerBlockSubmodules:
    """Returns what megatron-core's TransformerBlock is built of: `num_layers` equal layers and the final norm."""
    layer = _local_layer() if kind == "local" else _transformer_engine_layer()
    final_norm: Any = SequenceParallelLayerNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)


def _local_layer() -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=SequenceParallelLayerNorm,
            self_attention=_attention(ColumnParallelLinear, PackedAttention, RowParallelLinear),
            self_attn_bda=_RESIDUAL_ADD,
            pre_mlp_layernorm=SequenceParallelLayerNorm,
            mlp=_mlp(ColumnParallelLinear, RowParallelLinear),
            mlp_bda=_RESIDUAL_ADD,
            # Checkpoints carry Transformer Engine's names, so that either kind of layer reads them.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _transformer_engine_layer() -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    class RotaryDotProductAttention(TEDotProductAttention):
        """Transformer Engine's attention on rotated queries and keys.

        The rotation is done here, from tables made once per forward: megatron-core's packed path would slice the angles
        segment by segment with a host sync each, and its fused kernel restarts positions at every segment.
        """

        def forward(self, query: Any, key: Any, value: Any, *args: Any, packed_seq_params: Any, **kwargs: Any) -> Any:
            segments = packed_seq_params
            query, key = (rotate(x, segments.cos, segments.sin) for x in (query, key))
            return super().forward(query, key, value, *args, packed_seq_params=segments, **kwargs)

    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=_attention(TELayerNormColumnParallelLinear, RotaryDotProductAttention, TERowParallelLinear),
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
