"""Text generation in a run: the same under every layout, with each kind of decoder and bridge, resumed and resharded.

Documents of several pages, some without a text, in two folders of one source; a class head learns from them beside it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_toy_kinds import OVERLAP, SEQUENCE, VIRTUAL, assert_alike, figures, toy_config, walk
from tests.support.distributed import WorkerError, run_distributed
from tests.support.documents import write_documents, write_tokenizer
from tests.support.text_decoders import SECTIONS, write_published_decoder
from tests.support.tiny_run import write_tiny_sources
from tests.support.tool_scripts import run_script

SIZES = {"hidden_size": 48, "num_layers": 2, "num_attention_heads": 6, "ffn_hidden_size": 96}
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {"decoder": {"kind": "qwen2", **SIZES, "num_key_value_heads": 2}, "bridge": {"kind": "pixel_shuffle"}},
    "opt": {
        "decoder": {"kind": "opt", **SIZES, "max_positions": 128},
        "texts": {"documents": "turns", "others": "captions"},
    },
    "llama": {
        "decoder": {"kind": "llama", **SIZES, "num_key_value_heads": 2, "tied": False},
        "bridge": {"kind": "queries", "num_queries": 3},
        "texts": "captions",
    },
}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2_sp": SEQUENCE, "pp2": {"pipeline_model_parallel_size": 2}, "dp2_overlap": OVERLAP},
    4: {"tp2_sp_dp2_overlap": {**SEQUENCE, **OVERLAP}},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = write_tokenizer(folder / "tokenizer")
    found = {**write_tiny_sources(folder), "tokenizer": str(tokenizer)}
    for name, rows in {"first": range(7), "second": range(7, 19), "held_out": range(30, 39)}.items():
        found[name] = str(write_documents(folder / name, rows, num_classes=5))
        assert run_script("documents/cache_tokens.py", found[name], "--tokenizer", tokenizer) == 0
    return found


def config_of(sources: dict[str, str], run_dir: Path, *, decoder: str = "qwen2", **sections: Any) -> dict[str, Any]:
    """Returns a run on documents and, beside them, pages."""
    data = toy_config(sources, run_dir, encoder="onevision", **sections)
    documents = {"kind": "document", "path": [sources["first"], sources["second"]], "max_pages": 3}
    documents |= {"max_patches": [4, 6], "weight": 2.0}
    data["data"]["sources"] = {"documents": documents, "pages": data["data"]["sources"]["pages"]}
    data["data"]["text_tokens_per_microbatch"] = 64
    head = {**data["objectives"]["classes"], "source": "pages", "num_classes": 13, "labels_per_step": 2}
    texts = {"kind": "text_generation", "source": "documents", "tokenizer": sources["tokenizer"]}
    if decoder == "opt":  # one decoder, two sources
        data["data"]["sources"]["others"] = {**documents, "path": sources["held_out"], "weight": 1.0}
        texts |= {"source": ["documents", "others"]}
    texts |= {"max_text_tokens": 18, "instructions": {"ocr": "reading"}, "template": {"before_answer": "東京"}}
    texts |= {"max_written_tokens": 5, **copy.deepcopy(DECODERS[decoder])}
    data["objectives"] = {"classes": head, "read": texts}
    return data


@pytest.fixture(scope="module")
def references(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("references")
    run_distributed(walk_filled, 1, {one: config_of(sources, folder / one, decoder=one) for one in DECODERS})
    return {one: figures(folder / one) for one in DECODERS}


def test_each_decoder_learns(references: dict[str, list[dict[str, float]]]) -> None:
    for rows in references.values():
        assert {name for name in rows[0] if name.startswith("loss/")} == {"loss/classes", "loss/read"}
        assert rows[-1]["loss/read"] < rows[0]["loss/read"] - 0.1


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_agree_with_one_process(
    world_size: int, sources: dict[str, str], references: dict[str, list[dict[str, float]]], tmp_path: Path
) -> None:
    configs = {
        f"{one}_{name}": config_of(
            sources, tmp_path / f"{one}_{name}", decoder=one, parallel={"timeout_s": 60, **layout}
        )
        for one in DECODERS
        for name, layout in {**LAYOUTS[world_size], **({"vpp": VIRTUAL} if one == "qwen2" else {})}.items()
        if world_size == 2 or name != "vpp"
    }
    run_distributed(walk_filled, world_size, configs, timeout_s=280)
    for name in configs:
        assert_alike(figures(tmp_path / name), references[name.partition("_")[0]], 2e-5)


def test_a_microbatch_without_any_text(sources: dict[str, str], tmp_path: Path) -> None:
    few = {"global_batch_size": 3}
    run_distributed(walk_filled, 1, {"one": config_of(sources, tmp_path / "one", train=few)})
    four = config_of(sources, tmp_path / "four", train=few, parallel={"timeout_s": 60, **OVERLAP})
    run_distributed(walk_filled, 4, {"four": four})
    assert_alike(figures(tmp_path / "four"), figures(tmp_path / "one"), 2e-5)


def test_a_run_goes_on_to_the_bit_and_in_another_layout(
    sources: dict[str, str], references: dict[str, list[dict[str, float]]], tmp_path: Path
) -> None:
    half, overlap = {"stop_after_steps": 3}, {"timeout_s": 60, **OVERLAP}
    sequence = {"timeout_s": 60, **SEQUENCE, "use_distributed_optimizer": True}
    straight = config_of(sources, tmp_path / "straight", parallel=overlap)
    same = config_of(sources, tmp_path / "same", parallel=overlap)
    other = config_of(sources, tmp_path / "other", decoder="llama", parallel=overlap)
    then = config_of(sources, tmp_path / "other", decoder="llama", parallel=sequence)
    halves = {name: {**one, "train": {**one["train"], **half}} for name, one in {"a": same, "c": other}.items()}
    run_distributed(walk_filled, 2, {"straight": straight, "a": halves["a"], "b": same, "c": halves["c"], "d": then})
    assert figures(tmp_path / "same") == figures(tmp_path / "straight")
    assert_alike(figures(tmp_path / "other"), references["llama"], 2e-5)


def test_a_run_with_frozen_first_layers_goes_on(sources: dict[str, str], tmp_path: Path) -> None:
    """Gated layers are stored by gates and ups, and layers by themselves where some are frozen."""

    def run(name: str, parallel: dict[str, Any], **train: Any) -> dict[str, Any]:
        data = config_of(sources, tmp_path / name, parallel={"timeout_s": 60, **parallel}, train=train)
        return {**data, "freeze": ["objectives.read.decoder.transformer.layers.0", "encoder.layers.0-1"]}

    sequence = {**SEQUENCE, "use_distributed_optimizer": True}
    half = {"stop_after_steps": 3}
    runs = {"straight": run("straight", OVERLAP), "a": run("same", OVERLAP, **half), "b": run("same", OVERLAP)}
    runs |= {"c": run("other", sequence, **half), "d": run("other", OVERLAP)}
    ranks = run_distributed(walk_filled, 2, runs)
    assert figures(tmp_path / "same") == figures(tmp_path / "straight")
    assert_alike(figures(tmp_path / "other"), figures(tmp_path / "straight"), 2e-5)
    for name, values in ranks[0]["straight"].items():
        assert (values - ranks[0]["d"][name]).abs().max() < 2e-3, name


def test_held_out_texts_are_measured_alike_under_every_layout(sources: dict[str, str], tmp_path: Path) -> None:
    found = {}
    for size, name, layout in ((1, "one", {}), (2, "tp2_sp", SEQUENCE), (2, "vpp", VIRTUAL), (2, "dp2", OVERLAP)):
        data = config_of(sources, tmp_path / name, decoder="opt", parallel={"timeout_s": 60, **layout})
        data["evaluation"] = {"sets": {"read": sources["held_out"]}, "interval_steps": 3}
        run_distributed(walk_filled, size, {name: data})
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [
            {key: row[key] for key in row if key.startswith("held_out/")} for row in rows if "held_out_s" in row
        ]
    assert len(found["one"]) == 2
    names = ("loss", "token_accuracy", "character_error_rate", "word_error_rate", "exact", "empty", "cut", "repeated")
    assert {f"held_out/read/{name}" for name in (*names, "samples", "bad_samples")} == set(found["one"][0])
    assert found["one"][1]["held_out/read/loss"] < found["one"][0]["held_out/read/loss"]
    for name in found:
        assert_alike(found[name], found["one"], 2e-5)


def test_a_published_decoder_is_where_a_run_starts(sources: dict[str, str], tmp_path: Path) -> None:
    """Also its sizes; frozen it stays as it is, and a resumed run does not read the folder again."""
    section = SECTIONS["llama"].model_copy(update={"vocab_size": 300})
    folder = write_published_decoder(tmp_path / "decoder", section, scale=0.05)

    def run(name: str, parallel: dict[str, Any], **train: Any) -> dict[str, Any]:
        data = config_of(sources, tmp_path / name, parallel={"timeout_s": 60, **parallel}, train=train)
        data["objectives"]["read"] |= {"decoder": {"path": str(folder)}, "bridge": {"kind": "linear"}}
        return {**data, "freeze": ["objectives.read.decoder"]}

    (one,) = run_distributed(walk_filled, 1, {"one": run("one", {})})
    weights = one["one"]
    assert weights["objectives.read.decoder.output_table.weight"].shape == (768, 64)
    sequence = {**SEQUENCE, "use_distributed_optimizer": True}
    run_distributed(walk_filled, 2, {"half": run("two", sequence, stop_after_steps=3)})
    (folder / "model.safetensors").unlink()
    ranks = run_distributed(walk_filled, 2, {"two": run("two", OVERLAP)})
    assert_alike(figures(tmp_path / "two"), figures(tmp_path / "one"), 2e-5)
    for name, values in ranks[0]["two"].items():
        if name.startswith("objectives.read.decoder."):
            assert (values == weights[name]).all(), name


def walk_filled(rank: int, size: int, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """As `walk`, after filling in what folders say."""
    from megatron_ove.data.class_counts import fill_in_class_counts
    from tests.support.tiny_run import check

    filled = {name: fill_in_class_counts(check(data), "tiny").model_dump(mode="json") for name, data in configs.items()}
    return walk(rank, size, filled)


def test_tensor_ranks_that_do_not_divide_are_refused_with_those_that_do(
    sources: dict[str, str], tmp_path: Path
) -> None:
    four = {"timeout_s": 60, "tensor_model_parallel_size": 4}
    with pytest.raises(WorkerError) as error:
        run_distributed(walk_filled, 1, {"run": config_of(sources, tmp_path / "run", parallel=four)})
    assert "does not divide the heads, key-value heads and MLP of objectives.read.decoder; use one of 1, 2" in str(
        error.value
    )
