"""Which encoder parameters decay, by name, in the optimizer that megatron-core really builds."""

from __future__ import annotations

import pytest
import torch

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.optim import OptimConfig
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.optim.param_groups import has_weight_decay, set_group_hyperparameters
from tests.support.distributed import run_distributed

ENCODER = EncoderConfig(hidden_size=64, num_layers=2, num_attention_heads=2, ffn_hidden_size=128)
OPTIM = OptimConfig(lr=0.5, weight_decay=0.25, beta1=0.8, beta2=0.9, epsilon=1e-6, clip_grad_norm=0.5)

DECAYED = {
    "patch_embed.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
    "head.attention.in_proj_weight",
    "head.attention.out_proj.weight",
    "head.mlp.fc1.weight",
    "head.mlp.fc2.weight",
}


def build(config: OptimConfig, *, distributed: bool):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_ove.model.encoder import build_encoder
    from megatron_ove.optim.optimizer import build_dense_optimizer
    from megatron_ove.parallel.topology import initialize_topology

    topology = initialize_topology(ParallelConfig(use_distributed_optimizer=distributed), seed=0)
    encoder = build_encoder(ENCODER, topology, dtype=torch.float32, seed=0)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    chunk = DistributedDataParallel(encoder.config, ddp_config, encoder, pg_collection=topology.process_groups)
    optimizer = build_dense_optimizer(
        [chunk],
        config,
        names={parameter: f"encoder.{name}" for name, parameter in encoder.named_parameters()},
        num_layers=ENCODER.num_layers,
        dtype=torch.float32,
        use_distributed_optimizer=distributed,
        process_groups=topology.process_groups,
    )
    return encoder, chunk, optimizer


def one_step_with_zero_gradients(rank: int, world_size: int, distributed: bool) -> dict[str, float]:
    """Weights are set to 1; with zero gradients only weight decay moves them. Returns name -> largest change."""
    encoder, chunk, optimizer = build(OPTIM, distributed=distributed)
    with torch.no_grad():
        for param in encoder.parameters():
            param.fill_(1.0)
    optimizer.reload_model_params()
    optimizer.zero_grad()
    chunk.finish_grad_sync()
    assert optimizer.gradient_norms() == {"": 0.0}
    optimizer.step(0.5)
    return {name: float((1.0 - param.detach()).abs().max()) for name, param in encoder.named_parameters()}


@pytest.mark.parametrize(("world_size", "distributed"), [(1, False), (2, True)])
def test_only_weight_matrices_decay(world_size, distributed):
    changes = run_distributed(one_step_with_zero_gradients, world_size, distributed)[0]
    decayed = {name for name, change in changes.items() if change > 0}
    assert {name.split("layers.")[-1].lstrip("0123456789.") for name in decayed} == DECAYED
    assert all(change == pytest.approx(0.5 * 0.25) for name, change in changes.items() if name in decayed)
    kept = set(changes) - decayed
    assert "head.probe" in kept and "layernorm_pre.weight" in kept
    assert sum(name.endswith("bias") for name in kept) == sum(name.endswith("bias") for name in changes)


def updates_from_constant_gradient(rank: int, world_size: int, clip: float) -> tuple[float, float, float]:
    """Returns (norm, Adam's first moment of one weight, expected norm)."""
    encoder, _, optimizer = build(OPTIM.model_copy(update={"clip_grad_norm": clip}), distributed=False)
    optimizer.zero_grad()
    params = list(encoder.parameters())
    for param in params:
        param.main_grad.fill_(0.5)
    norm = optimizer.gradient_norms()[""]
    expected = 0.5 * sum(param.numel() for param in params) ** 0.5
    optimizer.step(0.1)
    first = optimizer.param_groups[0]["params"][0]
    return norm, float(optimizer._optimizer.optimizer.state[first]["exp_avg"].flatten()[0]), expected


def test_gradients_are_clipped_by_their_global_norm():
    norm, moment, expected = run_distributed(updates_from_constant_gradient, 1, 0.5)[0]
    assert norm == pytest.approx(expected, rel=1e-5)
    assert moment == pytest.approx((1 - 0.8) * 0.5 * 0.5 / expected, rel=1e-4)


def test_clip_of_zero_means_no_clipping():
    _, moment, _ = run_distributed(updates_from_constant_gradient, 1, 0.0)[0]
    assert moment == pytest.approx((1 - 0.8) * 0.5, rel=1e-5)


def test_hyperparameters_come_from_the_configuration_every_step():
    groups = [{"lr_mult": 1.0, "wd_mult": 1.0, "weight_decay": 9.0}, {"lr_mult": 2.0, "wd_mult": 0.0}]
    set_group_hyperparameters(groups, OPTIM, lr=0.1)
    assert [(g["lr"], g["weight_decay"], g["betas"], g["eps"]) for g in groups] == [
        (0.1, 0.25, (0.8, 0.9), 1e-6),
        (0.2, 0.0, (0.8, 0.9), 1e-6),
    ]


def test_the_rule_by_name():
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert has_weight_decay("encoder.patch_embed.weight", matrix)
    assert not has_weight_decay("encoder.layernorm_pre.weight", vector)
    assert not has_weight_decay("encoder.head.probe", torch.zeros(1, 1, 2))
    assert not has_weight_decay("encoder.head.mlp.fc1.bias", matrix)
