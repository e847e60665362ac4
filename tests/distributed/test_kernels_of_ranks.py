"""Kernels and ranks: layers in FP8 are counted over all stages, and a CPU never calls what needs CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ove.config.parallel import ParallelConfig
from tests.distributed.test_param_groups import one_step_with_zero_gradients
from tests.support.distributed import run_distributed
from tests.support.tiny import make_pack, mixed_samples, tiny_encoder_config

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "pp2, recompute": (2, {"pipeline_model_parallel_size": 2}, {"recompute": "full"}),
    "pp2_vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {}),
    "uneven": (2, {"pipeline_model_parallel_size": 2, "num_layers_in_last_stage": 2}, {}),
}


def fp8_layers(rank: int, world_size: int, parallel: dict[str, Any], encoder: dict[str, Any]) -> list[int]:
    """Returns the layers of this rank, counted from 0 over the whole model, that would run in FP8."""
    from contextlib import nullcontext

    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from megatron.core.transformer import transformer_block

    from megatron_ove.model import encoder as encoder_module
    from megatron_ove.model.kernels import EncoderKernels
    from megatron_ove.parallel.topology import initialize_topology

    encoder_module.resolve_kernels = lambda *args, **kwargs: EncoderKernels()  # FP8 on the CPU: only its contexts
    topology = initialize_topology(ParallelConfig(**parallel), seed=0)
    config = tiny_encoder_config(
        num_layers=8, layer_spec="auto", fp8="current", fp8_skip_first_layers=2, fp8_skip_last_layers=1, **encoder
    )
    chunks = encoder_module.build_encoder_chunks(config, topology, dtype=torch.float32, seed=0)
    entered = []

    def enter(config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        if not is_first_last_bf16_layer(config, layer_no):
            entered.append(layer_no)
        return nullcontext()

    transformer_block.get_fp8_context = enter
    transformer_block.te_checkpoint = lambda run, _distribute, _tracker, _group, *args: run(*args)
    pack = make_pack(mixed_samples())
    for chunk in chunks:
        if not chunk.pre_process:
            chunk.set_input_tensor(torch.zeros(pack.num_patches, 1, config.hidden_size, requires_grad=True))
        chunk(pack)
    return entered


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skipped_layers_are_those_of_the_whole_model(layout: str) -> None:
    world_size, parallel, encoder = LAYOUTS[layout]
    found = run_distributed(fp8_layers, world_size, parallel, encoder)
    assert sorted(layer for layers in found for layer in layers) == [2, 3, 4, 5, 6]


def step_beside_cuda_packages(rank: int, world_size: int, distributed: bool) -> dict[str, float]:
    """A step where megatron-core has found Transformer Engine, whose optimizer and norms cannot run here."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a CUDA kernel was called on a CPU")

    optimizer.USING_PYTORCH_OPTIMIZER, optimizer.Adam = False, fail
    distrib_optimizer.HAVE_APEX_OR_TE = True
    for module in (clip_grads, mixed_precision):
        module.multi_tensor_applier = module.multi_tensor_scale_impl = fail
    clip_grads.l2_norm_impl = fail
    return one_step_with_zero_gradients(rank, world_size, distributed)


@pytest.mark.parametrize(("world_size", "distributed"), [(1, False), (2, True)])
def test_a_cpu_uses_torchs_optimizer_whatever_is_installed(world_size: int, distributed: bool) -> None:
    changes = run_distributed(step_beside_cuda_packages, world_size, distributed)[0]
    assert changes["patch_embed.weight"] == pytest.approx(0.5 * 0.25)
