"""The quick start from end to end in its tiny form, its input handling, and its configuration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from megatron_ove.config.loader import load_config

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"


def run_demo(*arguments: object, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(QUICKSTART / "demo.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo's module for input; it is a script's neighbour, not a package."""
    monkeypatch.syspath_prepend(str(QUICKSTART))
    before = set(sys.modules)
    import inputs

    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(QUICKSTART)):
            monkeypatch.delitem(sys.modules, name)
    return inputs


@pytest.mark.full  # `make demo` goes the same way
def test_tiny_demo_from_input_to_page(tmp_path: Path) -> None:
    result = run_demo("--size", "tiny", "--run-dir", tmp_path / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    page = Path(result.stdout.splitlines()[-1])
    assert page == (tmp_path / "run/report.html").resolve()
    html = page.read_text(encoding="utf-8")
    assert html.count("<img ") > 20
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    for heading in (
        "Training",
        "Held-back cards and the words read on them",
        "A clip and its selected patches",
        "Nearest neighbours",
    ):
        assert heading in html
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    assert set(summary["heads"]) == {"image_clusters", "page_words", "clip_clusters"}
    assert all(head["last_loss"] < head["first_loss"] for head in summary["heads"].values())
    assert 0 < summary["export_difference"] <= 1e-5
    assert 0 < summary["stopped_at_step"] < summary["steps"] == 12
    assert summary["samples"] == 12 * 100
    # A vocabulary of 20 words leaves some cards without one, and nothing else is wrong.
    rejects = [json.loads(line) for line in (tmp_path / "run/rejects.jsonl").read_text().splitlines()]
    assert summary["rejects"] in ({}, {"page shards": len(rejects)})
    assert all(
        re.fullmatch(r"none of the page's \d words (is|are) in the .* of 20 words", r["reason"]) for r in rejects
    )
    reading = summary["cards_read_by_ocr"]
    assert reading["cards"] == 12 and reading["right"] == reading["words"] and reading["wrong"] == 0
    for stage in summary["retrieval"].values():
        for cards in ("page_to_words", "new_typefaces_to_words"):
            assert 0 <= stage[cards]["first_right"] <= 1 and "chance_first_right" in stage[cards]
    assert set(summary["seconds"]) == {"input", "preprocessing", "training", "resume", "export", "evaluation"}
    console = (tmp_path / "run/console.log").read_text(encoding="utf-8")
    assert f"Resumed from {tmp_path / 'run'}/checkpoints/step_{summary['stopped_at_step']:08d}" in console


def test_a_folder_with_too_little_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "a.jpg")
    result = run_demo("--images", folder, "--run-dir", tmp_path / "run", timeout_s=60)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"demo: IMAGES={folder} holds 1 usable file names, but the demo needs at least 5 to train on some and hold "
        "others out; add files, or leave IMAGES away to use the demo's own"
    ]


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    result = run_demo("--videos", tmp_path / "none", "--run-dir", tmp_path / "run", timeout_s=60)
    assert result.returncode == 2
    assert result.stderr.startswith(f"demo: the clip folder {tmp_path / 'none'} does not exist; give the folder")


def test_a_folder_of_something_else_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run_demo("--run-dir", tmp_path, timeout_s=60)
    assert result.returncode == 2
    assert "holds files that no earlier demo made; move them away or give another --run-dir" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_split_is_a_partition_that_depends_on_names_only(inputs: ModuleType) -> None:
    names = [f"sub/{number}.jpg" for number in range(23)]
    train, held_out = inputs.split_files(names)
    assert sorted(train + held_out) == sorted(names)
    assert len(held_out) == 4
    assert set(inputs.split_files(names[::-1])[1]) == set(held_out)


def test_configuration_loads_and_keeps_every_part_of_the_large_encoder() -> None:
    config = load_config(QUICKSTART / "config.yaml")
    assert {objective.source for objective in config.objectives.values()} == {"images", "pages", "clips"}
    assert config.encoder.use_head
    assert config.checkpoint.save_initial
    assert [source.path for source in config.data.sources.values()] == [
        f"{config.run_dir}/data/{kind}/train" for kind in config.data.sources
    ]


@pytest.mark.parametrize(("size", "hidden", "layers"), [("base", 768, 12), ("large", 1024, 24), ("huge", 1280, 32)])
def test_published_encoder_sizes(tmp_path: Path, size: str, hidden: int, layers: int) -> None:
    base = QUICKSTART.parent / f"_base/encoder_{size}.yaml"
    (tmp_path / "run.yaml").write_text(f"extends: [{QUICKSTART / 'config.yaml'}, {base}]\n")
    encoder = load_config(tmp_path / "run.yaml").encoder
    assert (encoder.hidden_size, encoder.num_layers, encoder.head_dim) == (hidden, layers, 64)
    assert (encoder.ffn_hidden_size, encoder.patch_size) == (4 * hidden, 14)
