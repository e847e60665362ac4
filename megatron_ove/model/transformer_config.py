"""From our two dozen settings to megatron-core's TransformerConfig.

Everything that changes the mathematics is fixed here: exact-erf GELU, no dropout, biases everywhere, no approximate
fusions. `encoder.mcore_overrides` may set the rest, by name, checked.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.fp8 import FP8_RECIPES
from megatron_ove.errors import ConfigError
from megatron_ove.model.kernels import EncoderKernels
from megatron_ove.parallel.topology import ParallelTopology

# Fields that would make another model of it, which neither checkpoints' checks nor exports would notice.
_OTHER_MODEL_PREFIXES = (
    *(
        "moe_",
        "linear_",
        "dsa_",
        "mamba_",
        "mtp_",
        "qk_",
        "window_",
        "softmax_",
        "activation_func",
        "glu_",
        "layernorm_",
    ),
    *("num_moe_experts", "num_query_groups", "kv_channels", "gated_linear_unit", "rotary_interleaved", "no_rope_freq"),
    *("apply_residual_connection_post_layernorm", "attention_output_gate", "multi_latent_attention", "mrope_section"),
    *("experimental_attention_variant", "heterogeneous_block_specs", "context_parallel_size", "fp16", "fp4"),
)

# Settings of ours that decide what a field of megatron-core would.
_OUR_SETTINGS = {"fp8": "encoder.fp8", "fp8_recipe": "encoder.fp8", "attention_backend": "encoder.attention_backend"}

# Fields whose other value makes a run wrong in silence.
_UNSAFE = {
    "calculate_per_token_loss": "gradients would be summed over replicas instead of averaged",
    "deallocate_pipeline_outputs": "a tensor would be freed while gloo may still be sending it",
}


def build_transformer_config(
    encoder: EncoderConfig, topology: ParallelTopology, *, dtype: torch.dtype, kernels: EncoderKernels
) -> TransformerConfig:
    """Builds megatron-core's configuration of the encoder.

    Args:
        encoder: the encoder's settings.
        topology: sizes of the parallel grid, and the device.
        dtype: of parameters, activations and pipeline messages; torch.float32 or torch.bfloat16.
        kernels: the implementations that will be built with it.

    Raises:
        ConfigError: an override that megatron-core does not have or refuses.
    """
    fields = {
        **_sizes(encoder),
        **_numerics(encoder, dtype),
        **fp8_fields(encoder),
        **_parallelism(topology, dtype),
        **_memory(encoder),
        "gradient_accumulation_fusion": kernels.fuses_weight_gradients,
    }
    _check_overrides(encoder.mcore_overrides, fields)
    try:
        return TransformerConfig(**{**fields, **encoder.mcore_overrides})
    except (ValueError, AssertionError, TypeError) as error:
        given = ", ".join(f"{name} = {value!r}" for name, value in encoder.mcore_overrides.items()) or "none"
        raise ConfigError(
            f"megatron-core refuses the encoder configuration (encoder.mcore_overrides: {given}): {error}; "
            "change or remove the setting it names"
        ) from error


def _sizes(encoder: EncoderConfig) -> dict[str, Any]:
    return {
        "num_layers": encoder.num_layers,
        "hidden_size": encoder.hidden_size,
        "num_attention_heads": encoder.num_attention_heads,
        "ffn_hidden_size": encoder.ffn_hidden_size,
    }


def _numerics(encoder: EncoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "activation_func": F.gelu,  # exact erf; megatron-core's fused bias-GELU is the tanh form
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "normalization": "LayerNorm",
        "layernorm_epsilon": encoder.layer_norm_epsilon,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "init_method": leave_uninitialised,
        "output_layer_init_method": leave_uninitialised,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,  # queries and keys are rotated by `rotation`, within the core attention
    }


def fp8_fields(encoder: EncoderConfig) -> dict[str, Any]:
    """Returns megatron-core's fields of the encoder's FP8 recipe; {} when FP8 is off.

    Layers are counted over the whole model, so skipped layers are the same under every pipeline layout.
    """
    if encoder.fp8 == "off":
        return {}
    recipe = FP8_RECIPES[encoder.fp8]
    fields: dict[str, Any] = {"fp8": recipe.number_format, "fp8_recipe": recipe.name}
    if encoder.fp8 == "delayed":
        # Transformer Engine's defaults. megatron-core's, the one step before, would let one odd batch set the scales.
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    first, last = encoder.fp8_skip_first_layers, encoder.fp8_skip_last_layers
    if first + last:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": first,
            "num_layers_at_end_in_bf16": last,
        }
    return fields


def leave_uninitialised(weight: Tensor) -> Tensor:
    """The encoder sets every parameter itself, by global name; see `initialization`."""
    return weight


def _parallelism(topology: ParallelTopology, dtype: torch.dtype) -> dict[str, Any]:
    # Interleaved chunks with batched sends mix up the messages between two gloo ranks, silently; so never batch them.
    # deallocate_pipeline_outputs stays off: it frees a sent tensor while gloo may still be reading it (seen, silent).
    is_interleaved = topology.virtual_pipeline_size is not None
    return {
        "tensor_model_parallel_size": topology.tensor_size,
        "pipeline_model_parallel_size": topology.pipeline_size,
        "virtual_pipeline_model_parallel_size": topology.virtual_pipeline_size,
        "num_layers_in_first_pipeline_stage": topology.first_stage_layers,
        "num_layers_in_last_pipeline_stage": topology.last_stage_layers,
        # megatron-core's other ways to split layers, which `plan` does not know
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "pipeline_model_parallel_layout": None,
        "sequence_parallel": topology.sequence_parallel,
        "pipeline_dtype": dtype,
        "overlap_p2p_comm": is_interleaved,
        "batch_p2p_comm": not is_interleaved,
        "use_cpu_initialization": topology.device.type == "cpu",
    }


def _memory(encoder: EncoderConfig) -> dict[str, Any]:
    if encoder.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if encoder.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _check_overrides(overrides: dict[str, Any], ours: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(TransformerConfig) if field.init]
    for name in overrides:
        if name in ours:
            raise ConfigError(
                f"encoder.mcore_overrides.{name} is decided by this project's own settings, and two places for one "
                "value would contradict each other; use the setting of the encoder or parallel section instead"
            )
        if name in _OUR_SETTINGS:
            raise ConfigError(
                f"encoder.mcore_overrides.{name} would bypass what is checked about the device and the shapes; use "
                f"{_OUR_SETTINGS[name]}"
            )
        if name in _UNSAFE:
            raise ConfigError(
                f"encoder.mcore_overrides.{name} would train wrongly without an error, because {_UNSAFE[name]}; remove "
                "it"
            )
        if name in known and name.startswith(_OTHER_MODEL_PREFIXES):
            raise ConfigError(
                f"encoder.mcore_overrides.{name} would change what the encoder computes, and neither checkpoints nor "
                "exports would know; remove it"
            )
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "remove it"
            raise ConfigError(
                f"encoder.mcore_overrides.{name} is not a field of megatron-core's TransformerConfig, so it would "
                f"have no effect; {hint}"
            )
