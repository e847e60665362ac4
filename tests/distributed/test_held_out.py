"""Figures on held-out data: the same on every layout, and a run that measures is bit-equal to one that does not."""

from __future__ import annotations

import gc
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_ove.data.bad_samples import read_bad_samples
from megatron_ove.data.synthetic import write_synthetic_shard_set
from megatron_ove.shards.format import Kind
from megatron_ove.shards.shard_set import ShardSet
from tests.support.distributed import run_distributed
from tests.support.layout_grid import grid_config
from tests.support.tiny_run import NUM_CLASSES, check, write_tiny_sources

OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
# So few samples that replicas have unequal numbers of them, and of three or four replicas one has none.
NUM_HELD_OUT = {"image": 31, "ocr": 6, "video": 2}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "DP 2, overlapped": OVERLAPPED,
        "TP 2, SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "PP 2, 2 chunks a rank": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    },
    3: {"DP 3": {}},
    4: {
        "PP 2, 2 chunks a rank, DP 2": {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            **OVERLAPPED,
        },
        "TP 2, DP 2": {"tensor_model_parallel_size": 2},
        "PP 2, DP 2, a table a replica": {"pipeline_model_parallel_size": 2, "class_group": "tensor"},
        "TP 2, PP 2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        "DP 4": {},
    },
}
BUCKETED: dict[str, dict[str, Any]] = {"whole": {}, "bucketed": OVERLAPPED}
NUM_STEPS = 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def write_held_out(folder: Path) -> dict[str, str]:
    """Writes a set a kind; returns objective -> path."""
    shapes: dict[Kind, dict[str, Any]] = {
        "image": {"picture_size": (56, 56)},
        "ocr": {"picture_size": (42, 56), "label_width": 12},
        "video": {"grid_height": 2, "grid_width": 2, "frames": 16, "selected_patches": 16},
    }
    for kind, shape in shapes.items():
        write_synthetic_shard_set(
            folder / kind,
            kind=kind,
            num_samples=NUM_HELD_OUT[kind],
            num_classes=NUM_CLASSES[kind],
            seed=7,
            **shape,
        )
    return {f"{kind}_labels": str(folder / kind) for kind in shapes}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_held_out(tmp_path_factory.mktemp("held_out"))


def config_of(
    sources: dict[str, str], run_dir: Path, layout: dict[str, Any], held_out: dict[str, str], **train: Any
) -> dict[str, Any]:
    data = grid_config(sources, run_dir, layout, precision="fp32", sample_rate=0.5)
    data["train"] |= {"num_steps": NUM_STEPS, **train}
    data["evaluation"] = {"sets": held_out, "interval_steps": 2, "max_samples": 30}
    return data


def train(rank: int, world_size: int, configs: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Trains one run after the other; returns this rank's weights and tables at the end of each."""
    from megatron_ove.parallel.topology import destroy_topology, initialize_topology
    from megatron_ove.training.trainer import Trainer

    results = []
    for number, data in enumerate(configs):
        if not dist.is_initialized():
            store = dist.FileStore(f"{data['run_dir']}.{number}.rendezvous", world_size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
            )
        config = check(data)
        trainer = Trainer(config, initialize_topology(config.parallel, seed=config.seed))
        trainer.run()
        tensors = {
            f"{i}.{name}": p.detach().clone() for i, c in enumerate(trainer.chunks) for name, p in c.named_parameters()
        }
        for name in trainer.objectives or ():
            tensors[name] = trainer.objectives[name].centers.weight.clone()  # type: ignore[index, attr-defined]
        tensors["generator"] = torch.get_rng_state()
        results.append(tensors)
        gc.collect()
        dist.barrier()
        destroy_topology()
    return results


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder: Path) -> dict[int, dict[str, float]]:
    """Returns step -> figures on held-out data."""
    found = [row for row in rows(folder) if "held_out_s" in row]
    return {int(row["step"]): {name: row[name] for name in row if name.startswith("held_out/")} for row in found}


def training_rows(folder: Path) -> list[dict[str, float]]:
    """Returns what a step computed, row by row."""
    kept = ("loss", "grad_norm", "positive_cosine", "effective_rank", "mean_cosine", "chance_loss")
    found = [row for row in rows(folder) if "held_out_s" not in row]
    return [{name: row[name] for name in row if name.partition("/")[0] in kept} for row in found]


@pytest.fixture(scope="module")
def one_rank(sources: dict[str, str], held_out: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank that measures; beside it one that does not, and one that is stopped and continued."""
    folder = tmp_path_factory.mktemp("one_rank")
    plain = config_of(sources, folder / "plain", {}, {})
    plain["evaluation"] = {}
    stopped = config_of(sources, folder / "resumed", {}, held_out, stop_after_steps=3)
    resumed = config_of(sources, folder / "resumed", {}, held_out)
    measured = config_of(sources, folder / "measured", {}, held_out)
    results = run_distributed(train, 1, [measured, plain, stopped, resumed], timeout_s=200)[0]
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), f"{name} differs when nothing is measured"
        assert name == "generator" or torch.equal(tensor, results[3][name]), f"{name} differs after a resume"
    return folder


def test_measuring_changes_nothing_and_a_resume_has_the_same_figures(one_rank: Path) -> None:
    assert (
        training_rows(one_rank / "measured") == training_rows(one_rank / "plain") == training_rows(one_rank / "resumed")
    )
    assert len(training_rows(one_rank / "measured")) == NUM_STEPS
    assert not figures(one_rank / "plain")
    found = figures(one_rank / "measured")
    assert list(found) == [2, 4]
    assert figures(one_rank / "resumed") == found
    last = found[4]
    assert [last[f"held_out/{kind}_labels/samples"] for kind in NUM_HELD_OUT] == [30, 6, 2]
    for kind in NUM_HELD_OUT:
        place = f"held_out/{kind}_labels"
        for name in ("mean_average_precision", "first_right", "recall_at_10"):
            assert 0 <= last[f"{place}/{name}"] <= 1
            assert last[f"{place}/chance_{name}"] == found[2][f"{place}/chance_{name}"] > 0
        assert last[f"{place}/bad_samples"] == 0
        assert last[f"{place}/mean_average_precision"] != found[2][f"{place}/mean_average_precision"]
    assert last["held_out/image_labels/chance_recall_at_10"] == pytest.approx(10 / 11)
    assert all("effective_rank/image_labels" in row for row in training_rows(one_rank / "measured"))


def test_figures_are_those_of_the_encoder_and_table_of_the_checkpoint(one_rank: Path, held_out: dict[str, str]) -> None:
    """The whole path against `evaluate`'s: the saved encoder, the saved centers, dense maths."""
    from megatron_ove.convert.class_centers import load_class_head
    from megatron_ove.convert.encoder_inference import load_encoder_for_inference
    from megatron_ove.evaluation.embedding import SampleSettings, embed_shard_set
    from megatron_ove.evaluation.retrieval import label_retrieval
    from megatron_ove.parallel.topology import destroy_topology

    checkpoint = one_rank / "measured/checkpoints/step_00000004"
    got = figures(one_rank / "measured")[4]
    encoder, _ = load_encoder_for_inference(checkpoint)
    try:
        for objective, path in held_out.items():
            shards = ShardSet.open(path)
            count = min(30, len(shards))
            embedded = embed_shard_set(
                lambda batch: encoder(batch.main).pooled,
                shards,
                SampleSettings(image_size=28, max_patches=16),
                indices=(np.arange(count) * len(shards) // count).tolist(),
            )
            head = load_class_head(checkpoint, objective)
            expected = label_retrieval(embedded.embeddings, head, embedded.labels, 10)
            for name in ("mean_average_precision", "recall_at_10", "first_right"):
                assert got[f"held_out/{objective}/{name}"] == pytest.approx(expected[name], rel=1e-5)
    finally:
        destroy_topology()


def train_in_small_buckets(rank: int, world_size: int, configs: list[dict[str, Any]]) -> None:
    """Trains with gradient buckets of a few weights each, where a layout has buckets at all."""
    from megatron_ove.parallel import gradient_buckets

    gradient_buckets.bucket_size = lambda data_size: 10_000
    train(rank, world_size, configs)


@pytest.mark.parametrize("centering", ["gradient", "embeddings"])
def test_centered_heads_and_figures_with_several_small_gradient_buckets(
    centering: str, sources: dict[str, str], held_out: dict[str, str], tmp_path: Path
) -> None:
    """The same microbatches on two replicas, with and without buckets: the same run.

    With centered gradients the last biases have a gradient of 0 but for rounding, which AdamW scales up to a whole step
    of its rate; so there only the first two steps are compared.
    """
    configs = [config_of(sources, tmp_path / name, layout, held_out) for name, layout in BUCKETED.items()]
    for data in configs:
        for objective in data["objectives"].values():
            objective["centering"] = centering
    run_distributed(train_in_small_buckets, 2, configs, timeout_s=200)
    whole, bucketed = (tmp_path / name for name in BUCKETED)
    last = 2 if centering == "gradient" else NUM_STEPS
    for row, expected in zip(training_rows(bucketed)[:last], training_rows(whole)[:last], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    for step in range(2, last + 1, 2):
        assert figures(bucketed)[step] == pytest.approx(figures(whole)[step], rel=1e-4)


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.full)])
def test_figures_do_not_depend_on_the_layout(
    sources: dict[str, str], held_out: dict[str, str], one_rank: Path, tmp_path: Path, world_size: int
) -> None:
    configs = {
        name: config_of(sources, tmp_path / name, layout, held_out) for name, layout in LAYOUTS[world_size].items()
    }
    first = next(iter(configs))
    plain = config_of(sources, tmp_path / "plain", LAYOUTS[world_size][first], {})
    results = run_distributed(train, world_size, [*configs.values(), plain], timeout_s=280)
    expected = figures(one_rank / "measured")
    for name in configs:
        got = figures(tmp_path / name)
        assert list(got) == list(expected)
        for step, values in expected.items():
            assert got[step] == pytest.approx(values, rel=1e-5), f"{name}, step {step}"
    assert training_rows(tmp_path / first) == training_rows(tmp_path / "plain")
    for rank in results:
        for name, tensor in rank[0].items():
            assert torch.equal(tensor, rank[-1][name]), f"{first}: {name} differs when nothing is measured"


def test_measuring_changes_nothing_in_bf16(sources: dict[str, str], held_out: dict[str, str], tmp_path: Path) -> None:
    measured = config_of(sources, tmp_path / "measured", OVERLAPPED, held_out, precision="bf16")
    plain = config_of(sources, tmp_path / "plain", OVERLAPPED, {}, precision="bf16")
    results = run_distributed(train, 2, [measured, plain], timeout_s=200)
    assert list(figures(tmp_path / "measured")) == [2, 4]
    assert training_rows(tmp_path / "measured") == training_rows(tmp_path / "plain")
    for rank in results:
        for name, tensor in rank[0].items():
            assert torch.equal(tensor, rank[1][name]), f"{name} differs when nothing is measured"


def test_a_sample_that_cannot_be_decoded_is_left_out_counted_and_recorded_once(
    sources: dict[str, str], tmp_path: Path
) -> None:
    held_out = write_held_out(tmp_path / "held_out")
    shards = ShardSet.open(held_out["ocr_labels"])
    offset, size = shards.index.place(4, "jpg")
    with shards.shard_path(4).open("r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(size))
    layout = {"pipeline_model_parallel_size": 2}
    stopped = config_of(sources, tmp_path / "run", layout, held_out, stop_after_steps=3)
    resumed = config_of(sources, tmp_path / "run", layout, held_out)
    run_distributed(train, 2, [stopped, resumed], timeout_s=200)
    found = figures(tmp_path / "run")
    for step in (2, 4):
        place = "held_out/ocr_labels"
        assert (found[step][f"{place}/samples"], found[step][f"{place}/bad_samples"]) == (5, 1)
    (record,) = read_bad_samples(tmp_path / "run")
    assert (record.step, record.source, record.row) == (2, "held_out/ocr_labels", 4)
    assert "cannot be decoded" in record.reason
    assert all("bad_samples" not in row or row["bad_samples"] == 0 for row in rows(tmp_path / "run"))
