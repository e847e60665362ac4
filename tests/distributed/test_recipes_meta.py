"""Every shipped full-size recipe builds, each stage of it, on the meta device, as large as its plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ove.config.loader import load_config
from megatron_ove.planning.devices import find_device
from megatron_ove.planning.plan import make_plan
from tests.support.distributed import repository_root, run_distributed

RECIPES = {
    "stage1_image/config.yaml": 128,
    "stage1_image/config_8gpu.yaml": 8,
    "stage2_joint/config.yaml": 128,
    "stage2_joint/config_8gpu.yaml": 8,
    "stage2_joint/config_native.yaml": 128,
    "huge/config.yaml": 512,
    "huge/config_8gpu.yaml": 8,
}


def build_stage(rank: int, world_size: int, path: Path, fake_rank: int, fake_size: int) -> dict[str, Any]:
    from tests.support.fake_world import build_on_meta, start_fake_world

    config = load_config(path)
    chunks = build_on_meta(config, start_fake_world(config, fake_rank, fake_size))
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    data = [buffer.param_data for buffer in buffers]
    return {
        "devices": {parameter.device.type for chunk in chunks for parameter in chunk.parameters()},
        "parameters": sum(one.numel() * one.element_size() for one in data),
        "gradients": sum(one.grad_data.numel() * one.grad_data.element_size() for one in buffers),
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_its_gpus_and_builds_on_the_meta_device(recipe):
    path, world_size = repository_root() / "examples" / recipe, RECIPES[recipe]
    plan = make_plan(load_config(path), world_size=world_size, device=find_device("a100-80g", world_size=world_size))
    assert plan.fits
    for one in plan.ranks:
        (built,) = run_distributed(build_stage, 1, path, one.rank, world_size)
        assert built["devices"] == {"meta"}
        assert (built["parameters"], built["gradients"]) == (one.memory.parameters, one.memory.gradients)
