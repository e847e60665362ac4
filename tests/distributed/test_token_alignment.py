"""Token alignment in a run: the same under every layout, resumed, resharded; the table is frozen and never stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ove.convert.checkpoint_files import read_tensors
from megatron_ove.convert.token_table import read_token_table, token_table_shape
from megatron_ove.data.class_counts import fill_in_class_counts
from megatron_ove.data.shard_fit import open_shard_sets
from megatron_ove.errors import CheckpointError, ConfigError, DataError
from tests.distributed.test_regions import named_weights
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
from tests.support.documents import write_boxed_documents, write_tokenizer
from tests.support.text_decoders import SECTIONS, write_published_decoder
from tests.support.tiny_run import check, write_tiny_sources

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2_sp": SEQUENCE, "pp2": {"pipeline_model_parallel_size": 2}, "vpp2": VIRTUAL, "dp2_overlap": OVERLAP},
    4: {"tp2_sp_dp2_overlap": {**SEQUENCE, **OVERLAP}},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    found = {**write_tiny_sources(folder), "tokenizer": str(write_tokenizer(folder / "tokenizer"))}
    section = SECTIONS["opt"].model_copy(update={"vocab_size": 300})
    found["decoder"] = str(write_published_decoder(folder / "decoder", section, scale=0.05))
    for name, rows in {"boxed": range(19), "held_out": range(30, 41)}.items():
        found[name] = str(write_boxed_documents(folder / name, rows))
    return found


def config_of(sources: dict[str, str], run_dir: Path, **sections: Any) -> dict[str, Any]:
    """Returns a run that aligns tokens with a published table and characters with random rows, beside a class head."""
    data = toy_config(sources, run_dir, encoder="onevision", **sections)
    documents = {"kind": "document", "path": sources["boxed"], "max_pages": 2, "max_patches": [4, 9], "weight": 2.0}
    data["data"]["sources"] = {"documents": documents, "pages": data["data"]["sources"]["pages"]}
    head = {**data["objectives"]["classes"], "source": "pages", "num_classes": 13}
    align = {"kind": "token_alignment", "source": "documents", "tokenizer": sources["tokenizer"], "max_tokens": 6}
    tokens = {**align, "table": {"path": sources["decoder"]}}
    letters = {**align, "table": {"width": 12}, "unit": "character", "upsample": 1, "loss_weight": 0.5}
    data["objectives"] = {"classes": head, "tokens": tokens, "letters": letters}
    return fill_in_class_counts(check(data), "tiny").model_dump(mode="json")


@pytest.fixture(scope="module")
def reference(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("reference")
    run_distributed(walk, 1, {"one": config_of(sources, folder / "one")})
    return figures(folder / "one")


def test_each_objective_learns(reference: list[dict[str, float]]) -> None:
    for name in ("tokens", "letters"):
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
    stored = read_tensors(tmp_path / f"same/checkpoints/step_{NUM_STEPS:08d}", "")
    rows, _ = token_table_shape(sources["decoder"])
    assert any("tokens.aligner.fc2" in name for name in stored)
    assert not [name for name, tensor in stored.items() if "tokens.aligner" in name and rows in tensor.shape]


def test_held_out_tokens_are_measured_alike(sources: dict[str, str], tmp_path: Path) -> None:
    found = {}
    layouts: dict[str, dict[str, Any]] = {"one": {}, "dp2": {}, "tp2": SEQUENCE}
    for name, layout in layouts.items():
        data = config_of(sources, tmp_path / name, parallel={"timeout_s": 60, **layout})
        data["evaluation"] = {"sets": {"tokens": sources["held_out"], "letters": sources["held_out"]}}
        run_distributed(walk, 1 if name == "one" else 2, {name: data})
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [
            {key: row[key] for key in row if key.startswith("held_out/") and "points" not in key}
            for row in rows
            if "held_out_s" in row
        ]
        assert "held_out/letters/points_right_by_chance" in rows[-1]
    for name in ("dp2", "tp2"):
        assert_alike(found[name], found["one"], 1e-4)


def test_the_plan_has_the_weights_and_the_table(sources: dict[str, str], tmp_path: Path) -> None:
    from megatron_ove.planning.layout import layout_of
    from megatron_ove.planning.needs import chunk_parameters, objective_footprint

    data = config_of(sources, tmp_path / "run")
    config = check(data)
    (named,) = run_distributed(named_weights, 1, data)
    layout = layout_of(config, 1)
    planned = chunk_parameters(config, layout, stage=0, chunk=0)
    assert [(one.name, one.shape) for one in planned] == named
    rows, width = token_table_shape(sources["decoder"])
    assert objective_footprint(config, "tokens").frozen_bytes(config, "tokens", layout) == rows * width * 4
    assert torch.equal(read_token_table(sources["decoder"])[:2], read_token_table(sources["decoder"])[:2])


def test_mistakes_are_sentences(sources: dict[str, str], tmp_path: Path) -> None:
    def refused(**section: Any) -> dict[str, Any]:
        data = config_of(sources, tmp_path / "run")
        data["objectives"]["tokens"] |= section
        return data

    with pytest.raises(ConfigError, match="holds samples of kind ocr, which have no boxes"):
        open_shard_sets(check(refused(source="pages")))
    with pytest.raises(ConfigError, match="l1_weight, cosine_weight and sigmoid_weight are all 0"):
        check(refused(l1_weight=0, cosine_weight=0, sigmoid_weight=0))
    with pytest.raises(ConfigError, match="table has neither path nor width"):
        check(refused(table={}))
    with pytest.raises(DataError, match=r"table.width = 5, but the rows of .* have 48 channels"):
        data = refused(table={"path": sources["decoder"], "width": 5}, tokenizer_fingerprint=None)
        fill_in_class_counts(check(data), "tiny")
    with pytest.raises(CheckpointError, match=r"holds no readable model\.safetensors"):
        read_token_table(tmp_path)
