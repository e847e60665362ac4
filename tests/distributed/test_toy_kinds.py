"""Kinds that a plugin adds train as built-in ones do: equal numbers under every layout, saved, resumed, resharded.

The toys are an objective with a layer of its own that looks at pixels, one without any weights, a source whose samples
are two segments, and an encoder. A Partial-FC head learns from the same samples beside them.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ove.cli.main import main
from megatron_ove.convert.checkpoint_files import read_tensors
from megatron_ove.convert.class_centers import load_class_head
from tests.support.distributed import WorkerError, run_distributed
from tests.support.tiny_run import check, tiny_config, write_tiny_sources

TOYS = "tests.support.toys"
NUM_STEPS = 6
ONEVISION = {"hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 192, "drop_path": 0.3}
MIXER = {"kind": "mixer", "hidden_size": 32, "num_layers": 4, "ffn_hidden_size": 48, "initializer_range": 0.1}
SMALL_BUCKETS = 5_000
"""Elements: several buckets, whose ends are no multiples of what the distributed optimizer pads to."""
VIRTUAL = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp2": {"tensor_model_parallel_size": 2},
        "tp2_sp": SEQUENCE,
        "pp2": {"pipeline_model_parallel_size": 2},
        "pp2_vpp2": VIRTUAL,
        "dp2": {},
        "dp2_overlap": OVERLAP,
    },
    4: {"tp2_sp_pp2_vpp2": {**SEQUENCE, **VIRTUAL}, "tp2_sp_dp2_overlap": {**SEQUENCE, **OVERLAP}},
}


OBJECTIVES: dict[str, dict[str, Any]] = {
    "bright": {"kind": "brightness", "source": ["pictures", "pages"], "loss_weight": 3.0},
    "spread": {"kind": "spread", "source": "pages"},
    "bright_pages": {"kind": "brightness", "source": "pages"},
}
"""Beside a Partial-FC head."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def toy_config(sources: dict[str, str], run_dir: Path | str, *, encoder: str, **sections: Any) -> dict[str, Any]:
    """Two sources and four objectives; `sections` are merged one level deep."""
    data = tiny_config(sources, run_dir, **{"train": {}, **sections})
    data["plugins"] = [f"{TOYS}.{name}" for name in ("brightness", "spread", "halves", "mixer")]
    data["encoder"] = (
        {**MIXER, **sections.get("encoder", {})} if encoder == "mixer" else {**data["encoder"], **ONEVISION}
    )
    pictures = {"kind": "halves", "path": sources["image"], "image_size": 28, "weight": 2.0}
    data["data"]["sources"] = {"pictures": pictures, "pages": data["data"]["sources"]["ocr"]}
    head = {**data["objectives"]["image_labels"], "source": "pictures"}
    data["objectives"] = {"classes": head, **copy.deepcopy(OBJECTIVES)}
    data["optim"] = {"lr": 1e-3, "schedule": {"warmup_steps": 2}, **sections.get("optim", {})}
    data["train"] |= {"num_steps": NUM_STEPS, "global_batch_size": 16, "ema_decay": 0.5, **sections.get("train", {})}
    return data


def walk(rank: int, world_size: int, configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Trains one configuration after the other; returns run -> name of a weight -> its values on this rank."""
    import torch.distributed as dist

    from megatron_ove.parallel import gradient_buckets
    from megatron_ove.parallel.topology import destroy_topology, initialize_topology
    from megatron_ove.training.trainer import Trainer

    gradient_buckets.bucket_size = lambda data_size: SMALL_BUCKETS
    weights = {}
    for name, data in configs.items():
        if not dist.is_initialized():
            Path(data["run_dir"]).mkdir(parents=True, exist_ok=True)
            store = dist.FileStore(f"{data['run_dir']}/{name}.rendezvous", world_size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
            )
        config = check(data)
        trainer = Trainer(config, initialize_topology(config.parallel, seed=config.seed))
        trainer.run()
        trainer.optimizer.finish_param_gather()
        weights[name] = {name: parameter.detach().clone() for parameter, name in trainer.names.items()}
        del trainer
        gc.collect()
        dist.barrier()
        destroy_topology()
    return weights


def figures(run_dir: Path) -> list[dict[str, float]]:
    """Returns losses and gradient norms of every step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name.split("/")[0] in ("loss", "grad_norm")} for row in rows]


def stored_averages(run_dir: Path) -> dict[str, torch.Tensor]:
    """Returns the averaged weights of a run's last checkpoint, whole; they differ from the weights."""
    checkpoint = run_dir / "checkpoints" / f"step_{NUM_STEPS:08d}"
    found, weights = read_tensors(checkpoint, "average."), read_tensors(checkpoint, "mod")
    assert {f"average.{name}" for name in weights if not name.endswith("_extra_state")} == set(found)
    assert not any(torch.equal(found[f"average.{name}"], weights[name]) for name in weights if "weight" in name)
    return found


def assert_alike(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    assert len(found) == len(expected) and found
    for row, reference in zip(found, expected, strict=True):
        assert row.keys() == reference.keys()
        for name, value in reference.items():
            assert row[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


@pytest.fixture(scope="module")
def references(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("reference")
    configs = {name: toy_config(sources, folder / name, encoder=name) for name in ("onevision", "mixer")}
    run_distributed(walk, 1, configs)
    return {name: figures(folder / name) for name in configs}


def test_a_budget_of_an_objective_is_kept(sources: dict[str, str], tmp_path: Path) -> None:
    from megatron_ove.data.build import build_source
    from megatron_ove.data.planner import planner_of
    from megatron_ove.data.shard_fit import open_shard_sets

    config = check(toy_config(sources, tmp_path, encoder="onevision"))
    opened = open_shard_sets(config)
    common = {"kinds": config.kinds, "patch_size": 14, "device": torch.device("cpu"), "num_threads": 1}
    planned = [build_source(name, one, opened[name], **common) for name, one in config.data.sources.items()]
    for step in range(4):
        plan = planner_of(config, planned, data_size=2).plan(step)
        pages = plan.microbatch_index[plan.source_index == list(config.data.sources).index("pages")]
        assert np.bincount(pages).max() <= 3


def test_each_objective_learns_and_is_told_apart(references: dict[str, list[dict[str, float]]]) -> None:
    for rows in references.values():
        assert {name for name in rows[0] if name.startswith("loss/")} == {
            f"loss/{name}" for name in ("classes", *OBJECTIVES)
        }
        assert rows[-1]["loss/bright"] < 0.9 * rows[0]["loss/bright"]
        assert {name for name in rows[0] if name.startswith("grad_norm")} == {"grad_norm", "grad_norm/classes"}


@pytest.mark.parametrize("encoder", ["onevision", "mixer"])
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_agree_with_one_process(
    world_size: int, encoder: str, sources: dict[str, str], references: dict[str, Any], tmp_path: Path
) -> None:
    configs = {
        name: toy_config(sources, tmp_path / name, encoder=encoder, parallel={"timeout_s": 60, **layout})
        for name, layout in LAYOUTS[world_size].items()
    }
    run_distributed(walk, world_size, configs, timeout_s=280)
    for name in configs:
        assert_alike(figures(tmp_path / name), references[encoder], 2e-5)
    averages = [stored_averages(tmp_path / name) for name in configs]
    for name, average in averages[0].items():
        # A tenth of a step on average: AdamW makes much of the rounding where a gradient is nearly 0.
        assert all((other[name] - average).abs().mean() < 1e-4 for other in averages), name


def test_a_microbatch_without_any_sample(sources: dict[str, str], tmp_path: Path) -> None:
    """Three samples on four replicas: whoever has none sends gradients of 0 for every weight."""
    few = {"global_batch_size": 3}
    one = toy_config(sources, tmp_path / "one", encoder="onevision", train=few)
    run_distributed(walk, 1, {"one": one})
    four = toy_config(sources, tmp_path / "four", encoder="onevision", train=few, parallel=OVERLAP)
    run_distributed(walk, 4, {"four": four})
    assert_alike(figures(tmp_path / "four"), figures(tmp_path / "one"), 2e-5)


@pytest.mark.parametrize("encoder", ["onevision", "mixer"])
def test_a_run_goes_on_in_its_own_layout_and_in_another(
    encoder: str, sources: dict[str, str], references: dict[str, Any], tmp_path: Path
) -> None:
    half, whole = {"stop_after_steps": 3}, {"stop_after_steps": None}

    def part(run: str, train: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Any]:
        return toy_config(sources, tmp_path / run, encoder=encoder, train=train, parallel=parallel)

    overlap, sequence = {"timeout_s": 60, **OVERLAP}, {"timeout_s": 60, **SEQUENCE, "use_distributed_optimizer": True}
    in_one_go = run_distributed(walk, 2, {"straight": part("straight", whole, overlap)})
    resumed = run_distributed(walk, 2, {"a": part("same", half, overlap), "b": part("same", whole, overlap)})
    assert figures(tmp_path / "same") == figures(tmp_path / "straight")
    averages = [stored_averages(tmp_path / name) for name in ("same", "straight")]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
    for rank in range(2):
        for name, values in in_one_go[rank]["straight"].items():
            assert (resumed[rank]["b"][name] == values).all(), name
    run_distributed(walk, 2, {"a": part("other", half, overlap), "b": part("other", whole, sequence)})
    assert_alike(figures(tmp_path / "other"), references[encoder], 2e-5)


def test_frozen_parts_stay_and_the_others_move(sources: dict[str, str], tmp_path: Path) -> None:
    """Also where layers are recomputed, whose input then wants no gradient."""
    frozen = ["encoder.patch_embed", "encoder.layernorm_pre", "encoder.layers.0-2", "encoder.head"]
    frozen += ["objectives.bright.layer.bias"]
    data = toy_config(sources, tmp_path / "run", encoder="onevision", parallel=OVERLAP)
    start = {**data, "run_dir": str(tmp_path / "start"), "train": {**data["train"], "stop_after_steps": 1}}
    start["optim"] = {**data["optim"], "lr": 1e-30}  # as initialised, for comparison
    run = {**data, "freeze": frozen, "encoder": {**data["encoder"], "recompute": "full"}}
    half = {**run, "train": {**run["train"], "stop_after_steps": 3}}
    weights = run_distributed(walk, 2, {"start": start, "half": half, "run": run})
    for before, after in ((rank["start"], rank["run"]) for rank in weights):
        stays = {name for name in before if (before[name] - after[name]).abs().max() < 1e-20}
        wanted = (
            "encoder.patch_embed",
            "encoder.layernorm_pre",
            "encoder.head",
            *(f"encoder.layers.{layer}." for layer in range(3)),
        )
        assert stays == {name for name in before if name.startswith(wanted)} | {"objectives.bright.layer.bias"}
    assert main(["inspect", str(tmp_path / f"run/checkpoints/step_{NUM_STEPS:08d}"), "--verify"]) == 0
    for name in ("metrics.jsonl", "checkpoints/step_00000003"):
        source, target = tmp_path / "run" / name, tmp_path / "other" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    run_distributed(walk, 1, {"other": {**run, "run_dir": str(tmp_path / "other"), "parallel": OVERLAP}})
    assert_alike(figures(tmp_path / "other"), figures(tmp_path / "run"), 2e-5)


def test_only_a_table_learns(sources: dict[str, str], tmp_path: Path) -> None:
    """Nothing dense is trained, so there is no optimizer to store; the head's mean follows the embeddings as always."""
    frozen = ["encoder", "objectives.bright", "objectives.bright_pages"]
    data = {**toy_config(sources, tmp_path / "straight", encoder="onevision"), "freeze": frozen}
    data["objectives"]["classes"]["centering"] = "embeddings"
    resumed = {**data, "run_dir": str(tmp_path / "resumed")}
    half = {**resumed, "train": {**resumed["train"], "stop_after_steps": 3}}
    run_distributed(walk, 1, {"straight": data, "half": half, "resumed": resumed})
    assert figures(tmp_path / "resumed") == figures(tmp_path / "straight")
    first, *_, last = (row["loss/classes"] for row in figures(tmp_path / "straight"))
    assert last < first

    frozen_table = {**toy_config(sources, tmp_path / "table", encoder="onevision"), "freeze": ["objectives.classes"]}
    frozen_table["objectives"]["classes"]["centering"] = "embeddings"
    run_distributed(walk, 1, {"table": frozen_table})
    mean = load_class_head(tmp_path / f"table/checkpoints/step_{NUM_STEPS:08d}", "classes").mean
    assert mean is not None and mean.any()


@pytest.mark.parametrize(
    ("freeze", "parallel", "sentence"),
    [
        (
            ["encoder.patch_embed", "encoder.layernorm_pre", "encoder.layers.0-1"],
            {"pipeline_model_parallel_size": 2},
            "freeze leaves a stage of the pipeline without any dense weight to train, so the optimizer's state could n",
        ),
        (
            ["encoder", "objectives.bright", "objectives.bright_pages"],
            {"use_distributed_optimizer": True},
            "freeze leaves no dense weight to train, so parallel.use_distributed_optimizer has nothing to share; set i",
        ),
    ],
)
def test_what_freezing_leaves_too_little_of_is_a_sentence(
    freeze: list[str], parallel: dict[str, Any], sentence: str, sources: dict[str, str], tmp_path: Path
) -> None:
    data = toy_config(sources, tmp_path, encoder="onevision", parallel={"timeout_s": 60, **parallel})
    with pytest.raises(WorkerError) as error:
        run_distributed(walk, 2, {"run": {**data, "freeze": freeze}})
    assert sentence in str(error.value)
