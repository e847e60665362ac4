"""Documents of several pages, with labels and texts: the same run under every layout, resumed and resharded.

Two folders of one source, in block order; a class head, an objective that reads texts by their token cache, and one
that looks at pixels learn from it, with two budgets a microbatch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_toy_kinds import OVERLAP, SEQUENCE, VIRTUAL, assert_alike, figures, toy_config, walk
from tests.support.distributed import run_distributed
from tests.support.documents import write_documents, write_tokenizer
from tests.support.tiny_run import write_tiny_sources
from tests.support.tool_scripts import run_script

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2_sp": SEQUENCE, "pp2_vpp2": VIRTUAL, "dp2_overlap": OVERLAP},
    4: {"tp2_sp_dp2_overlap": {**SEQUENCE, **OVERLAP}},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = write_tokenizer(folder / "tokenizer")
    found = {**write_tiny_sources(folder), "tokenizer": str(tokenizer)}
    for name, rows in {"first": range(7), "second": range(7, 19)}.items():
        found[name] = str(write_documents(folder / name, rows, num_classes=5))
        assert run_script("documents/cache_tokens.py", found[name], "--tokenizer", tokenizer) == 0
    return found


def config_of(sources: dict[str, str], run_dir: Path, **sections: Any) -> dict[str, Any]:
    """Returns a run on documents and, beside them, pages."""
    data = toy_config(sources, run_dir, encoder="onevision", **sections)
    data["plugins"] = [*data["plugins"], "tests.support.toys.text_length"]
    documents = {"kind": "document", "path": [sources["first"], sources["second"]], "max_pages": 3}
    documents |= {"max_patches": [4, 6], "weight": 2.0, "order": {"block": 2, "window": 8}}
    data["data"]["sources"] = {"documents": documents, "pages": data["data"]["sources"]["pages"]}
    data["data"]["text_tokens_per_microbatch"] = 30
    head = {**data["objectives"]["classes"], "source": "documents", "num_classes": 5, "labels_per_step": 2}
    data["objectives"] = {
        "classes": head,
        "texts": {"kind": "text_length", "source": "documents", "tokenizer": sources["tokenizer"]},
        "bright": {"kind": "brightness", "source": ["documents", "pages"]},
    }
    return data


@pytest.fixture(scope="module")
def reference(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("reference")
    run_distributed(walk, 1, {"one": config_of(sources, folder / "one")})
    return figures(folder / "one")


def test_each_objective_has_its_loss(reference: list[dict[str, float]]) -> None:
    assert {name for name in reference[0] if name.startswith("loss/")} == {"loss/classes", "loss/texts", "loss/bright"}
    assert all(row[name] > 0 for row in reference for name in row)


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
    four = config_of(sources, tmp_path / "four", train=few, parallel={"timeout_s": 60, **OVERLAP})
    run_distributed(walk, 4, {"four": four})
    assert_alike(figures(tmp_path / "four"), figures(tmp_path / "one"), 2e-5)


def test_a_run_goes_on_in_another_layout(
    sources: dict[str, str], reference: list[dict[str, float]], tmp_path: Path
) -> None:
    first = config_of(sources, tmp_path / "run", train={"stop_after_steps": 3}, parallel={"timeout_s": 60, **OVERLAP})
    then = config_of(sources, tmp_path / "run", parallel={"timeout_s": 60, **SEQUENCE})
    then["parallel"]["use_distributed_optimizer"] = True
    run_distributed(walk, 2, {"a": first, "b": then})
    assert_alike(figures(tmp_path / "run"), reference, 2e-5)
