"""Reconstruction in a run: the same under every layout; the teacher is frozen, unseen and never stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ove.convert.checkpoint_files import read_tensors
from megatron_ove.data.class_counts import fill_in_class_counts
from megatron_ove.data.shard_fit import open_shard_sets
from megatron_ove.errors import CheckpointError, DataError
from tests.distributed.test_toy_kinds import (
    NUM_STEPS,
    OVERLAP,
    SEQUENCE,
    VIRTUAL,
    assert_alike,
    figures,
    toy_config,
    walk,
)
from tests.support.distributed import run_distributed
from tests.support.tiny_run import check, write_tiny_sources

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2_sp": SEQUENCE, "pp2": {"pipeline_model_parallel_size": 2}, "vpp2": VIRTUAL, "dp2_overlap": OVERLAP},
    4: {"tp2_sp_dp2_overlap": {**SEQUENCE, **OVERLAP}},
}
TEACHER_WIDTH = 64


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shard sets, and a run of a few steps whose encoder is the teacher."""
    folder = tmp_path_factory.mktemp("sources")
    found = write_tiny_sources(folder)
    data = toy_config(found, folder / "teacher", encoder="onevision")
    data["encoder"] |= {"hidden_size": TEACHER_WIDTH, "num_attention_heads": 2, "num_layers": 2, "drop_path": 0.1}
    run_distributed(walk, 1, {"teacher": data})
    return {**found, "teacher": str(folder / "teacher")}


def config_of(sources: dict[str, str], run_dir: Path, **sections: Any) -> dict[str, Any]:
    """Returns a run whose pages the teacher sees scaled down, with a class head beside it; all filled in."""
    data = toy_config(sources, run_dir, encoder="onevision", **sections)
    pictures = {"kind": "image", "path": sources["image"], "image_size": [28, 42], "weight": 2.0}
    data["data"]["sources"]["pictures"] = pictures
    keep = {"kind": "feature_reconstruction", "source": ["pictures", "pages"], "loss_weight": 2.0}
    keep["teacher"] = {"path": sources["teacher"], "max_patches": 4}
    pixels = {"kind": "pixel_reconstruction", "source": "pages", "structure_weight": 0.5}
    data["objectives"] = {"classes": data["objectives"]["classes"], "keep": keep, "pixels": pixels}
    return fill_in_class_counts(check(data), "tiny").model_dump(mode="json")


@pytest.fixture(scope="module")
def reference(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("reference")
    run_distributed(walk, 1, {"one": config_of(sources, folder / "one")})
    return figures(folder / "one")


def test_each_objective_learns(reference: list[dict[str, float]]) -> None:
    for name in ("keep", "pixels"):
        assert reference[-1][f"loss/{name}"] < 0.95 * reference[0][f"loss/{name}"]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_agree_with_one_process(
    world_size: int, sources: dict[str, str], reference: list[dict[str, float]], tmp_path: Path
) -> None:
    configs = {
        name: config_of(sources, tmp_path / name, parallel={"timeout_s": 60, **layout})
        for name, layout in LAYOUTS[world_size].items()
    }
    run_distributed(walk, world_size, configs, timeout_s=280)
    for name in configs:
        assert_alike(figures(tmp_path / name), reference, 2e-5)


def test_a_microbatch_without_any_sample(sources: dict[str, str], tmp_path: Path) -> None:
    few = {"global_batch_size": 3}
    run_distributed(walk, 1, {"one": config_of(sources, tmp_path / "one", train=few)})
    run_distributed(walk, 4, {"four": config_of(sources, tmp_path / "four", train=few, parallel=OVERLAP)})
    assert_alike(figures(tmp_path / "four"), figures(tmp_path / "one"), 2e-5)


def test_the_teacher_stays_as_it_is_and_nobody_sees_it(sources: dict[str, str], tmp_path: Path) -> None:
    for config in run_distributed(watch, 2, config_of(sources, tmp_path / "run", parallel=OVERLAP)):
        assert config == {"moved": [], "in_a_bucket": [], "trained": []}
    stored = read_tensors(tmp_path / f"run/checkpoints/step_{NUM_STEPS:08d}", "")
    assert not [name for name in stored if "teacher" in name]
    widths = {size for name, tensor in stored.items() if "keep" in name for size in tensor.shape}
    assert widths == {128, TEACHER_WIDTH}  # the head alone


def watch(rank: int, size: int, data: dict[str, Any]) -> dict[str, list[str]]:
    from megatron_ove.parallel import gradient_buckets
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    gradient_buckets.bucket_size = lambda data_size: 5_000
    config = check(data)
    trainer: Any = Trainer(config, initialize_topology(config.parallel, seed=config.seed))
    teacher = dict(trainer.objectives["keep"]._teacher.encoder.named_parameters())
    before = {name: parameter.clone() for name, parameter in teacher.items()}
    trainer.run()
    held = {id(parameter) for chunk in trainer.chunks for parameter in chunk.param_to_bucket_group}
    groups = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    return {
        "moved": [name for name, parameter in teacher.items() if not torch.equal(parameter, before[name])],
        "in_a_bucket": [name for name, parameter in teacher.items() if id(parameter) in held],
        "trained": [name for name, parameter in teacher.items() if id(parameter) in groups or parameter.requires_grad],
    }


def test_a_run_goes_on_to_the_bit_and_in_another_layout(
    sources: dict[str, str], reference: list[dict[str, float]], tmp_path: Path
) -> None:
    half, overlap = {"stop_after_steps": 3}, {"timeout_s": 60, **OVERLAP}
    sequence = {"timeout_s": 60, **SEQUENCE, "use_distributed_optimizer": True}
    runs = {
        "straight": config_of(sources, tmp_path / "straight", parallel=overlap),
        "a": config_of(sources, tmp_path / "same", parallel=overlap, train=half),
        "b": config_of(sources, tmp_path / "same", parallel=overlap),
        "c": config_of(sources, tmp_path / "other", parallel=overlap, train=half),
        "d": config_of(sources, tmp_path / "other", parallel=sequence),
    }
    run_distributed(walk, 2, runs)
    assert figures(tmp_path / "same") == figures(tmp_path / "straight")
    assert_alike(figures(tmp_path / "other"), reference, 2e-5)


def test_held_out_pictures_are_measured_alike(sources: dict[str, str], tmp_path: Path) -> None:
    """Also where the last stage is not the first, which decodes the pictures."""
    found = {}
    for size, name, layout in ((1, "one", {}), (2, "pp2", {"pipeline_model_parallel_size": 2})):
        data = config_of(sources, tmp_path / name, parallel={"timeout_s": 60, **layout})
        data["evaluation"] = {"sets": {"keep": sources["image"], "pixels": sources["ocr"]}}
        run_distributed(walk, size, {name: data})
        rows = [row for row in read_rows(tmp_path / name) if "held_out_s" in row]
        found[name] = [{key: row[key] for key in row if key.startswith("held_out/")} for row in rows]
    assert {"held_out/keep/loss", "held_out/keep/cosine", "held_out/pixels/structure"} <= set(found["one"][-1])
    assert_alike(found["pp2"], found["one"], 2e-5)


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_teacher_that_is_not_there_or_has_changed_is_a_sentence(sources: dict[str, str], tmp_path: Path) -> None:
    data = config_of(sources, tmp_path / "run")
    data["objectives"]["keep"]["teacher"] = {"path": sources["teacher"]}  # a run: not yet the very checkpoint
    assert set(open_shard_sets(check(data))) == {"pictures", "pages"}
    data["objectives"]["keep"]["teacher"] = {"path": str(tmp_path / "nothing"), "fingerprint": None}
    with pytest.raises(
        DataError, match=r"objectives\.keep: teacher\.path = .* holds no finished checkpoint and is no Hug"
    ):
        fill_in_class_counts(check(data), "tiny")
    from megatron_ove.config.reconstruction import TeacherConfig
    from megatron_ove.objectives.reconstruction.teacher import resolve_teacher

    found = resolve_teacher(TeacherConfig(path=sources["teacher"]))
    assert found.path.endswith(f"step_{NUM_STEPS:08d}") and resolve_teacher(found) == found
    with pytest.raises(CheckpointError, match="has other weights than the run began with"):
        resolve_teacher(found.model_copy(update={"fingerprint": "0" * 16}))
