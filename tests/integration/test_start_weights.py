"""`init_from`: parts of other runs, of exports and of published models, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ove.convert.class_centers import load_class_head
from megatron_ove.convert.exchange import OneVisionExchange
from tests.distributed.test_toy_kinds import toy_config
from tests.support.distributed import WorkerError, run_distributed
from tests.support.tiny_run import check, write_tiny_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def start(rank: int, world_size: int, data: dict[str, Any], train: bool = False) -> dict[str, Any]:
    """Builds a run, or trains it; returns its weights by name, class centers of this rank and what was logged."""
    import logging

    from megatron_ove.parallel.topology import destroy_topology, initialize_topology
    from megatron_ove.training.trainer import Trainer

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_ove").addHandler(handler)
    logging.getLogger("megatron_ove").setLevel(logging.INFO)
    config = check(data)
    trainer = Trainer(config, initialize_topology(config.parallel, seed=config.seed))
    if train:
        trainer.run()
    else:
        trainer.loader.close()
    weights = {name: parameter.detach().clone() for parameter, name in trainer.names.items()}
    if trainer.objectives is not None:
        centers = trainer.objectives["classes"].centers
        weights["centers"], weights["steps"] = centers.weight.clone(), centers.steps.clone()
    weights["log"] = lines
    destroy_topology()
    return weights


@pytest.fixture(scope="module")
def trained(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two replicas with the distributed optimizer; its folder and what it ended with."""
    run_dir = tmp_path_factory.mktemp("trained")
    parallel = {"use_distributed_optimizer": True, "timeout_s": 60}
    data = toy_config(sources, run_dir, encoder="onevision", train={"num_steps": 3}, parallel=parallel)
    return run_dir, run_distributed(start, 2, data, True)[0]


def new_run(sources: dict[str, str], folder: Path, init_from: Any, **sections: Any) -> dict[str, Any]:
    data = toy_config(sources, folder, encoder="onevision", **sections)
    return {**data, "seed": 99, "init_from": init_from}


def same(weights: dict[str, Any], others: dict[str, Any], part: str) -> bool:
    names = [name for name in weights if name.startswith(part)]
    assert names
    return all(torch.equal(weights[name], others[name]) for name in names)


def test_a_path_alone_takes_the_encoder(trained: Any, sources: dict[str, str], tmp_path: Path) -> None:
    run_dir, expected = trained
    found = run_distributed(start, 1, new_run(sources, tmp_path, str(run_dir)))[0]
    assert same(found, expected, "encoder.")
    assert not torch.equal(found["objectives.bright.layer.weight"], expected["objectives.bright.layer.weight"])
    (taken,) = [line for line in found["log"] if line.startswith("init_from = ")]
    assert "encoder; left there: objectives.classes, objectives.bright, objectives.spread" in taken
    assert (
        "Starting with random weights: objectives.bright, objectives.bright_pages, objectives.classes." in found["log"]
    )


def test_heads_and_layers_by_name_from_several_places(trained: Any, sources: dict[str, str], tmp_path: Path) -> None:
    """On another layout than the one that wrote them."""
    run_dir, expected = trained
    init_from = [
        {"path": str(run_dir), "parts": ["encoder.layers.0-1", "objectives.classes"]},
        {"path": str(run_dir / "checkpoints" / "step_00000003"), "parts": ["objectives.bright"]},
    ]
    parallel = {"tensor_model_parallel_size": 2, "timeout_s": 60}
    found = run_distributed(start, 2, new_run(sources, tmp_path, init_from, parallel=parallel))
    whole = run_distributed(start, 1, new_run(sources, tmp_path / "one", init_from))[0]
    for layer, is_taken in enumerate((True, True, False, False)):
        assert same(whole, expected, f"encoder.layers.{layer}.mlp.linear_fc1.weight") is is_taken
    assert same(whole, expected, "objectives.bright.layer")
    centers = load_class_head(run_dir / "checkpoints" / "step_00000003", "classes").centers
    rows = torch.cat([rank["centers"] for rank in found])
    assert torch.equal(rows.sort(dim=0).values, centers.sort(dim=0).values)  # rows lie in another order than classes
    assert torch.equal(rows, whole["centers"]) and not whole["steps"].any()


def test_an_export_gives_encoder_and_class_centers(trained: Any, sources: dict[str, str], tmp_path: Path) -> None:
    run_dir, expected = trained
    checkpoint = run_dir / "checkpoints" / "step_00000003"
    exported = OneVisionExchange().export(checkpoint, tmp_path / "export", with_class_centers=True)
    parts = ["encoder", "objectives.classes"]
    parallel = {"tensor_model_parallel_size": 2, "timeout_s": 60}
    data = new_run(sources, tmp_path / "run", [{"path": str(exported), "parts": parts}], parallel=parallel)
    found = run_distributed(start, 2, data)
    one = run_distributed(start, 1, new_run(sources, tmp_path / "one", [{"path": str(exported), "parts": parts}]))[0]
    assert same(one, expected, "encoder.")
    rows = torch.cat([rank["centers"] for rank in found])
    assert torch.equal(rows, one["centers"])
    centers = load_class_head(checkpoint, "classes").centers
    assert torch.equal(rows.sort(dim=0).values, centers.sort(dim=0).values)


@pytest.mark.parametrize(
    ("parts", "change", "sentence"),
    [
        (["encoder.nose"], {}, "this run has no part encoder.nose; its parts are for instance encoder."),
        (["objectives.classes"], {"num_classes": 12}, "holds another head: objectives.classes.num_classes is 11 there"),
        (["encoder"], {"ffn_hidden_size": 256}, "another encoder: encoder.ffn_hidden_size is 192 there and 256 here"),
    ],
)
def test_what_does_not_fit_is_a_sentence(
    parts: list[str],
    change: dict[str, int],
    sentence: str,
    trained: Any,
    sources: dict[str, str],
    tmp_path: Path,
) -> None:
    data = new_run(sources, tmp_path, [{"path": str(trained[0]), "parts": parts}])
    section = data["encoder"] if "ffn_hidden_size" in change else data["objectives"]["classes"]
    section |= change
    with pytest.raises(WorkerError) as error:
        run_distributed(start, 1, data)
    assert sentence in str(error.value)
