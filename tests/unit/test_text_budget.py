"""Room for texts in a microbatch: asked for, kept, and nothing of a text lost in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ove.config.train import TrainConfig
from megatron_ove.data.build import build_source
from megatron_ove.data.planner import planner_of
from megatron_ove.data.shard_fit import find_doubts, open_shard_sets
from megatron_ove.errors import ConfigError
from megatron_ove.planning.packing_report import measure_packing
from megatron_ove.planning.stored_samples import largest_samples
from tests.support.documents import write_documents, write_tokenizer
from tests.support.tiny_run import check, tiny_config
from tests.support.tool_scripts import run_script

BUDGET, MOST = 20, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    write_documents(path / "set", range(21))
    write_tokenizer(path / "tokenizer")
    assert run_script("documents/cache_tokens.py", path / "set", "--tokenizer", path / "tokenizer") == 0
    return path


def config_of(folder: Path, **data: Any) -> TrainConfig:
    found = tiny_config(dict.fromkeys(("image", "ocr", "video"), ""), folder / "run")
    source = {"kind": "document", "path": str(folder / "set"), "max_patches": 8, "max_pages": 3}
    found["plugins"] = ["tests.support.toys.text_length"]
    found["data"] = {
        "sources": {"documents": source},
        "tokens_per_microbatch": 64,
        "text_tokens_per_microbatch": BUDGET,
        **data,
    }
    texts = {"kind": "text_length", "source": "documents", "tokenizer": str(folder / "tokenizer")}
    found["objectives"] = {"texts": {**texts, "max_text_tokens": MOST}}
    return check({**found, "train": {**found["train"], "global_batch_size": 12}})


def test_no_microbatch_has_more_text_than_its_budget(folder: Path) -> None:
    config = config_of(folder)
    shards = open_shard_sets(config)["documents"]
    section = config.data.sources["documents"]
    common = {"kinds": config.kinds, "patch_size": 14, "device": torch.device("cpu"), "num_threads": 1}
    source = build_source("documents", section, shards, **common)
    planner = planner_of(config, [source], data_size=2)
    lengths = np.minimum(np.load(next((folder / "set").glob("tokens-*/text_lengths.npy"))), MOST) + 1
    for step in range(6):
        plan = planner.plan(step)
        filled = np.bincount(plan.microbatch_index, lengths[plan.rows], plan.num_microbatches)
        assert filled.max() <= BUDGET
    figures = measure_packing(config, [source], budget=64, replicas=2, num_steps=6)
    assert list(figures.fullness) == ["data.tokens_per_microbatch", "data.text_tokens_per_microbatch"]
    assert figures.fullness["data.text_tokens_per_microbatch"] > 0.6
    assert all(0 < share <= 1 for share in figures.fullness.values())


def test_samples_that_are_only_assumed_have_the_longest_texts(folder: Path) -> None:
    config = config_of(folder)
    plan = planner_of(config, largest_samples(config), data_size=1).plan(0)
    assert np.bincount(plan.microbatch_index).max() == BUDGET // (MOST + 1)


def test_what_is_cut_or_empty_is_told(folder: Path) -> None:
    config = config_of(folder)
    cut, empty = find_doubts(config, open_shard_sets(config), counts_samples=True)
    lengths = np.load(next((folder / "set").glob("tokens-*/text_lengths.npy")))
    count, lost = int((lengths > MOST).sum()), int(np.maximum(lengths - MOST, 0).sum())
    assert cut.startswith(
        f"{count} of 21 samples of data.sources.documents have more than 8 tokens and are cut: {lost} "
    )
    assert empty.startswith("3 of 21 samples of data.sources.documents have no text to learn from")


def test_a_budget_is_needed_by_who_reads_texts_and_by_nobody_else(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.text_tokens_per_microbatch is not set, but objectives\.texts reads"):
        config_of(folder, text_tokens_per_microbatch=None)
    data = tiny_config(dict.fromkeys(("image", "ocr", "video"), ""), tmp_path)
    data["data"]["text_tokens_per_microbatch"] = 8192
    with pytest.raises(
        ConfigError, match=r"text_tokens_per_microbatch = 8192 has no effect, because no objective reads"
    ):
        check(data)


def test_a_text_that_fits_no_microbatch_is_a_sentence(folder: Path) -> None:
    config = config_of(folder, text_tokens_per_microbatch=7)
    with pytest.raises(ConfigError, match=r"takes 9 of data\.text_tokens_per_microbatch, more than its 7 of a"):
        planner_of(config, largest_samples(config), data_size=1).plan(0)


def test_a_set_without_a_cache_is_a_sentence_before_the_start(folder: Path, tmp_path: Path) -> None:
    bare = write_documents(tmp_path / "bare", range(5))
    source = {"kind": "document", "path": str(bare), "max_patches": 8, "max_pages": 3}
    with pytest.raises(
        ConfigError, match=r"bare has no token cache of the tokenizer [0-9a-f]{16}, by which the lengths"
    ):
        open_shard_sets(config_of(folder, sources={"documents": source}))
