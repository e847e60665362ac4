"""Every shipped full-size recipe builds, each stage of it, on the meta device, as large as its plan says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.loader import load_config
from megatron_ove.config.text_generation import TextDecoderConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.convert.decoder_config import decoder_to_hf
from megatron_ove.convert.hf_config import to_hf_config
from megatron_ove.data.class_counts import fill_in_class_counts
from megatron_ove.planning.devices import find_device
from megatron_ove.planning.plan import Plan, make_plan
from tests.support.distributed import repository_root, run_distributed
from tests.support.documents import write_tokenizer

RECIPES = {
    "stage1_image/config.yaml": 128,
    "stage1_image/config_8gpu.yaml": 8,
    "stage2_joint/config.yaml": 128,
    "stage2_joint/config_8gpu.yaml": 8,
    "stage2_joint/config_native.yaml": 128,
    "huge/config.yaml": 512,
    "huge/config_8gpu.yaml": 8,
    "progressive/low.yaml": 128,
    "progressive/high.yaml": 128,
}
UNIT = ("unit/intra_scale.yaml", "unit/inter_scale.yaml")


def build_stage(
    rank: int, world_size: int, path: Path, fake_rank: int, fake_size: int, overrides: list[str]
) -> dict[str, Any]:
    from tests.support.fake_world import build_on_meta, start_fake_world

    config = filled(path, overrides)
    chunks = build_on_meta(config, start_fake_world(config, fake_rank, fake_size))
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    data = [buffer.param_data for buffer in buffers]
    data += [one for chunk in chunks for one in chunk.parameters() if not one.requires_grad]
    return {
        "devices": {parameter.device.type for chunk in chunks for parameter in chunk.parameters()},
        "parameters": sum(one.numel() * one.element_size() for one in data),
        "gradients": sum(one.grad_data.numel() * one.grad_data.element_size() for one in buffers),
    }


def filled(path: Path, overrides: list[str]) -> TrainConfig:
    return fill_in_class_counts(load_config(path, overrides), str(path))


def check_recipe(recipe: str, world_size: int, overrides: list[str]) -> Plan:
    path = repository_root() / "examples" / recipe
    device = find_device("a100-80g", world_size=world_size)
    plan = make_plan(filled(path, overrides), world_size=world_size, device=device)
    assert plan.fits
    for one in plan.ranks:
        (built,) = run_distributed(build_stage, 1, path, one.rank, world_size, overrides)
        assert built["devices"] == {"meta"}
        assert built["gradients"] == one.memory.gradients
        assert built["parameters"] + plan_frozen_bytes(plan) == one.memory.parameters
    return plan


def plan_frozen_bytes(plan: Plan) -> int:
    """Bytes of weights that belong to no model: a teacher's."""
    footprints = plan.config.kinds.objectives
    return sum(
        footprints[section.kind].footprint().frozen_bytes(plan.config, name, plan.layout)
        for name, section in plan.config.objectives.items()
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_its_gpus_and_builds_on_the_meta_device(recipe):
    check_recipe(recipe, RECIPES[recipe], [])


@pytest.fixture(scope="module")
def unit_folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What UNIT starts from, as large as it is, without its values: a decoder, its tokenizer and a teacher."""
    folder = tmp_path_factory.mktemp("unit")
    decoder = TextDecoderConfig(
        kind="opt",
        hidden_size=768,
        num_layers=12,
        num_attention_heads=12,
        ffn_hidden_size=3072,
        vocab_size=50_272,
        max_positions=2048,
    )
    opt, teacher = folder / "opt-125m", folder / "teacher"
    for path in (opt, teacher):
        path.mkdir()
    (opt / "config.json").write_text(json.dumps(decoder_to_hf(decoder, dtype="float16", end_token_id=2)))
    write_tokenizer(opt)
    huge = load_config(repository_root() / "examples/huge/config.yaml").encoder
    assert isinstance(huge, EncoderConfig)
    (teacher / "config.json").write_text(json.dumps(to_hf_config(huge, image_size=224, dtype=torch.bfloat16)))
    (teacher / "model.safetensors").write_bytes(b"weights that nobody reads here")
    overrides = [f"objectives.write.decoder.path={opt}", f"objectives.keep.teacher.path={teacher}"]
    return [*overrides, "objectives.write.template.end_token=<|endoftext|>"]


@pytest.mark.parametrize("recipe", UNIT)
def test_unit_fits_its_gpus_and_builds_on_the_meta_device(recipe: str, unit_folders: list[str]) -> None:
    plan = check_recipe(recipe, 64, unit_folders)
    opt = 125_239_296
    assert plan.num_parameters[0] > 650_110_720 + opt
    assert plan_frozen_bytes(plan) == 2 * 650_110_720
