"""Which implementation of each part of a layer this machine gets: layers, attention, rotation, norms, weight gradients.

Decided once, from the settings and from what is installed; every choice and everything that is lost is said in the log,
and what was asked for by name and cannot be had is an error. Nothing here changes what the encoder computes, beyond
rounding.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import shutil
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.fp8 import FP8_RECIPES, Fp8Recipe
from megatron_ove.errors import ConfigError

logger = logging.getLogger(__name__)

LayerSpecKind = Literal["local", "transformer_engine"]
AttentionKind = Literal["sdpa", "flash", "transformer_engine"]
RotationKind = Literal["torch", "compiled", "transformer_engine"]
NormKind = Literal["torch", "apex"]

_APEX_NORM = "apex.normalization.fused_layer_norm"
_APEX_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"


@dataclass(frozen=True)
class EncoderKernels:
    """The implementations that an encoder is built of.

    Attributes:
        layers: whose linear layers.
        attention: whose attention within samples.
        rotation: what turns queries and keys.
        norm: the LayerNorm outside of Transformer Engine's linear layers.
        fuses_weight_gradients: whether a matrix product adds its weight's gradient to DistributedDataParallel's buffer.
    """

    layers: LayerSpecKind = "local"
    attention: AttentionKind = "sdpa"
    rotation: RotationKind = "torch"
    norm: NormKind = "torch"
    fuses_weight_gradients: bool = False

    def __str__(self) -> str:
        gradients = "added by the matrix product" if self.fuses_weight_gradients else "separate"
        return (
            f"layers {self.layers}, attention {self.attention}, rotation {self.rotation}, norms {self.norm}, "
            f"weight gradients {gradients}"
        )


def resolve_kernels(
    encoder: EncoderConfig, device: torch.device, dtype: torch.dtype, *, has_gradient_buffers: bool
) -> EncoderKernels:
    """Decides what to build, and says so.

    Args:
        encoder: the settings.
        device: the encoder's.
        dtype: of its activations.
        has_gradient_buffers: whether DistributedDataParallel will hold the gradients of this encoder.

    Raises:
        ConfigError: something was asked for by name and cannot be had here.
    """
    layers = resolve_layer_spec(encoder, device)
    check_fp8(encoder, layers, device)
    uses_fused = encoder.fused_kernels and device.type == "cuda"
    kernels = EncoderKernels(
        layers=layers,
        attention=resolve_attention(encoder, layers, device, dtype),
        rotation=_resolve_rotation(encoder, layers, device, uses_fused=uses_fused),
        norm="apex" if uses_fused and _is_importable(_APEX_NORM) else "torch",
        fuses_weight_gradients=uses_fused
        and has_gradient_buffers
        and (layers == "transformer_engine" or _is_importable(_APEX_WEIGHT_GRADIENT)),
    )
    logger.info("The encoder's kernels: %s", kernels)
    return kernels


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
        "encoder.layer_spec = auto uses local layers, because %s; fused norms and rotation and FP8 are not available",
        obstacle,
    )
    return "local"


def _transformer_engine_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "this run is on the CPU and Transformer Engine needs CUDA"
    return _import_problem("transformer_engine", "Transformer Engine", "transformer_engine.pytorch")


def check_fp8(encoder: EncoderConfig, layers: LayerSpecKind, device: torch.device) -> None:
    """Checks that FP8, if asked for, is what this machine would really compute in.

    Raises:
        ConfigError: the layers or the device do not have it.
    """
    if encoder.fp8 == "off":
        return
    if layers != "transformer_engine":
        raise ConfigError(
            f"encoder.fp8 = {encoder.fp8} needs Transformer Engine layers, and this run uses local layers, which would "
            "ignore it in silence; install the gpu extra on a CUDA machine, or set encoder.fp8: off"
        )
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    problem = fp8_obstacle(encoder.fp8, torch.cuda.get_device_capability(device), version)
    if problem:
        raise ConfigError(problem)


def fp8_obstacle(recipe: str, capability: tuple[int, int], cuda: tuple[int, ...]) -> str | None:
    """Returns the sentence that says why a device cannot compute in an FP8 recipe; None when it can.

    Args:
        recipe: a key of FP8_RECIPES.
        capability: of the device, e.g. (9, 0) for Hopper.
        cuda: version that torch was built with.
    """
    needs = FP8_RECIPES[recipe]
    others = [name for name, other in FP8_RECIPES.items() if _runs_on(other, capability, cuda)]
    use = f"use encoder.fp8: {' or '.join(others)}" if others else "set encoder.fp8: off"
    if not needs.oldest <= capability < needs.below:
        return (
            f"encoder.fp8 = {recipe} runs on {needs.devices}, and this device has compute capability "
            f"{capability[0]}.{capability[1]}; {use}"
        )
    if cuda < needs.cuda:
        return (
            f"encoder.fp8 = {recipe} needs CUDA {needs.cuda[0]}.{needs.cuda[1]} or newer, and this torch was built "
            f"with CUDA {'.'.join(map(str, cuda))}; {use}, or install a newer torch"
        )
    return None


def _runs_on(recipe: Fp8Recipe, capability: tuple[int, int], cuda: tuple[int, ...]) -> bool:
    return recipe.oldest <= capability < recipe.below and cuda >= recipe.cuda


def resolve_attention(
    encoder: EncoderConfig, layers: LayerSpecKind, device: torch.device, dtype: torch.dtype
) -> AttentionKind:
    """Decides whose attention runs, and says what is lost when `auto` finds no flash-attn on a GPU.

    Raises:
        ConfigError: the attention that was asked for cannot be used here.
    """
    asked = encoder.attention_backend
    if asked == "transformer_engine" and layers != "transformer_engine":
        raise ConfigError(
            "encoder.attention_backend = transformer_engine needs Transformer Engine layers, and this run uses local "
            "layers; install the gpu extra on a CUDA machine, or set encoder.attention_backend: auto"
        )
    if asked == "sdpa" or asked == "transformer_engine":
        return asked
    if asked == "auto" and layers == "transformer_engine":
        return "transformer_engine"
    obstacle = flash_obstacle(encoder.head_dim, device, dtype)
    if obstacle is None:
        return "flash"
    if asked == "flash":
        raise ConfigError(
            f"encoder.attention_backend = flash, but {obstacle}; install the flash-attn extra on a machine with a CUDA "
            "device and train in bf16, or set encoder.attention_backend: auto"
        )
    if device.type == "cuda":
        logger.warning(
            "encoder.attention_backend = auto uses torch's scaled_dot_product_attention, because %s; each run of "
            "neighbouring samples of equal length then takes a kernel of its own, which is slower for mixed packs",
            obstacle,
        )
    return "sdpa"


def flash_obstacle(head_dim: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the clause that says why flash-attn cannot attend here; None when it can."""
    if device.type != "cuda":
        return "this run is on the CPU and flash-attn needs CUDA"
    if dtype != torch.bfloat16:
        return "train.precision is fp32 and flash-attn computes in bf16"
    if head_dim > 256:
        return f"the head dim {head_dim} is more than its 256"
    problem = _import_problem("flash_attn", "flash-attn", "flash_attn")
    if problem is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "this device is older than Ampere, the oldest it runs on"
    return problem


def _resolve_rotation(
    encoder: EncoderConfig, layers: LayerSpecKind, device: torch.device, *, uses_fused: bool
) -> RotationKind:
    if uses_fused and layers == "transformer_engine":
        return "transformer_engine"
    if not encoder.compile:
        return "torch"
    obstacle = _compile_obstacle(device)
    if obstacle:
        raise ConfigError(f"encoder.compile = true, but {obstacle}; install it, or set encoder.compile: false")
    return "compiled"


def _compile_obstacle(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs Triton, which is not installed"
    compilers = ("c++", "g++", "clang++")
    if any(shutil.which(name) for name in compilers):
        return None
    return f"torch.compile needs a C++ compiler on a CPU, and none of {', '.join(compilers)} is on the PATH"


def _is_importable(module: str) -> bool:
    return _import_problem(module.partition(".")[0], module, module) is None


def _import_problem(package: str, name: str, module: str) -> str | None:
    """Returns a clause when a package is missing or, built for another torch, cannot be loaded."""
    if importlib.util.find_spec(package) is None:
        return f"{name} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a wrong binary fails in many ways: ImportError, OSError, RuntimeError, AssertionError
        text = (str(error) or type(error).__name__).splitlines()[0]
        return f"{name} is installed but cannot be loaded ({text[:200]})"
    return None
