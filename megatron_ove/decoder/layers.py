"""What a decoder's layers are made of, and megatron-core's configuration of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ove.config.text_generation import TextDecoderConfig
from megatron_ove.decoder.attention import CausalPackedAttention, FlashCausalAttention
from megatron_ove.model.kernels import flash_obstacle
from megatron_ove.model.layer_specs import SequenceParallelLayerNorm
from megatron_ove.model.linear import LocalColumnParallelLinear, LocalRowParallelLinear
from megatron_ove.model.parameter_names import FUSED_NORMS
from megatron_ove.model.transformer_config import leave_uninitialised
from megatron_ove.parallel.topology import ParallelTopology

_RESIDUAL_ADD: Any = get_bias_dropout_add


def decoder_transformer_config(
    section: TextDecoderConfig, topology: ParallelTopology, dtype: torch.dtype
) -> TransformerConfig:
    """Returns megatron-core's configuration of a decoder that lies whole on the last pipeline stage.

    Args:
        section: the decoder, all sizes known.
        topology: sizes of the parallel grid, and the device.
        dtype: of parameters and activations.
    """
    is_opt = section.kind == "opt"
    return TransformerConfig(
        num_layers=section.num_layers or 0,
        hidden_size=section.hidden_size or 0,
        num_attention_heads=section.num_attention_heads or 0,
        num_query_groups=section.key_value_heads,
        ffn_hidden_size=section.ffn_hidden_size,
        normalization="LayerNorm" if is_opt else "RMSNorm",
        layernorm_epsilon=section.norm_epsilon,
        gated_linear_unit=not is_opt,
        activation_func=F.relu if is_opt else F.silu,
        add_bias_linear=is_opt,
        add_qkv_bias=section.kind != "llama",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        init_method=leave_uninitialised,
        output_layer_init_method=leave_uninitialised,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=topology.tensor_size,
        pipeline_model_parallel_size=1,  # so that layers count from 0 on the stage that has them
        sequence_parallel=topology.sequence_parallel,
        use_cpu_initialization=topology.device.type == "cpu",
    )


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """As `SequenceParallelLayerNorm`, for RMSNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def build_decoder_submodules(config: TransformerConfig, device: torch.device) -> TransformerBlockSubmodules:
    """Returns what megatron-core's TransformerBlock is built of.

    Args:
        config: of `decoder_transformer_config`.
        device: of the decoder, which decides whose attention runs.
    """
    norm: Any = SequenceParallelRMSNorm if config.normalization == "RMSNorm" else SequenceParallelLayerNorm
    head_dim = config.hidden_size // config.num_attention_heads
    is_flash = flash_obstacle(head_dim, device, config.params_dtype) is None
    attention: Any = FlashCausalAttention if is_flash else CausalPackedAttention
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=LocalColumnParallelLinear,
                    core_attention=attention,
                    linear_proj=LocalRowParallelLinear,
                ),
            ),
            self_attn_bda=_RESIDUAL_ADD,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=LocalColumnParallelLinear, linear_fc2=LocalRowParallelLinear),
            ),
            mlp_bda=_RESIDUAL_ADD,
            # As the encoder's layers: Transformer Engine's names, so that layers of it could read a checkpoint.
            sharded_state_dict_keys_map={
                separate.removeprefix("."): fused.removeprefix(".") for fused, separate in FUSED_NORMS.items()
            },
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=norm)
