"""Every kind, built in or from a plugin, walks through what a user does with a run; and plugins that are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.error_report import field_paths
from megatron_ove.config.loader import config_from_dict
from megatron_ove.convert.checkpoint_files import write_encoder_checkpoint
from megatron_ove.convert.mapping import mcore_shapes
from megatron_ove.errors import ConfigError
from megatron_ove.kinds import load_kinds
from tests.distributed.test_toy_kinds import toy_config
from tests.support.documents import write_documents, write_tokenizer
from tests.support.tiny_run import tiny_config, write_config, write_tiny_sources
from tests.support.tool_scripts import run_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def command(*arguments: str) -> str:
    """Runs the program from the folder that holds the plugins; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ove", *arguments],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def add_documents(data: dict[str, Any], folder: Path) -> None:
    """Adds one set of documents in two folders that serves a head of classes and an objective that reads texts."""
    paths = [write_documents(folder / name, rows, num_classes=5) for name, rows in SETS.items()]
    tokenizer = write_tokenizer(folder / "tokenizer")
    for path in paths:
        assert run_script("documents/cache_tokens.py", path, "--tokenizer", tokenizer) == 0
    data["plugins"] = [*data["plugins"], "tests.support.toys.text_length"]
    data["data"]["sources"]["documents"] = {
        "kind": "document",
        "path": [str(path) for path in paths],
        "max_patches": [4, 6],
        "max_pages": 3,
        "order": {"block": 2, "window": 8},
    }
    data["data"]["text_tokens_per_microbatch"] = 30
    data["objectives"]["document_classes"] = {**data["objectives"]["classes"], "source": "documents", "num_classes": 5}
    data["objectives"]["texts"] = {"kind": "text_length", "source": "documents", "tokenizer": str(tokenizer)}


def add_writing(data: dict[str, Any], folder: Path) -> None:
    """Adds a decoder that reads the same documents, and what keeps features of a teacher and pixels."""
    sizes = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 48}
    data["objectives"]["read"] = {
        **{"kind": "text_generation", "source": "documents", "decoder": {"kind": "llama", **sizes}},
        **{"tokenizer": data["objectives"]["texts"]["tokenizer"], "max_text_tokens": 12},
    }
    data["data"]["text_tokens_per_microbatch"] = 60
    teacher = EncoderConfig(hidden_size=64, num_layers=1, num_attention_heads=2, ffn_hidden_size=32)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in mcore_shapes(teacher).items()}
    write_encoder_checkpoint(folder / "teacher", state, teacher, facts={})
    teaches = {"path": str(folder / "teacher"), "max_patches": 4}
    data["objectives"]["keep"] = {"kind": "feature_reconstruction", "source": "pages", "teacher": teaches}
    data["objectives"]["pixels"] = {"kind": "pixel_reconstruction", "source": "pages", "structure_weight": 0.5}


def add_alignment(data: dict[str, Any]) -> None:
    """Adds what looks at the boxes of the same documents."""
    align = {"kind": "token_alignment", "source": "documents", "table": {"width": 8}, "upsample": 1}
    data["objectives"]["align"] = {**align, "tokenizer": data["objectives"]["texts"]["tokenizer"]}


SETS = {"first": range(7), "second": range(7, 12)}


@pytest.mark.parametrize("encoder", ["onevision", "mixer"])
def test_every_kind_walks_through_a_run(encoder: str, sources: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    data = toy_config(sources, run_dir, encoder=encoder, train={"num_steps": 3, "ema_decay": 0.9})
    data["checkpoint"] = {"interval_steps": 2}
    data["data"]["sources"]["clips"] = tiny_config(sources, run_dir)["data"]["sources"]["video"]
    data["objectives"]["clip_classes"] = {**data["objectives"]["classes"], "source": "clips", "num_classes": 7}
    add_documents(data, tmp_path)
    add_writing(data, tmp_path)
    add_alignment(data)
    kinds = load_kinds(tuple(data["plugins"]))
    assert {one["kind"] for one in data["objectives"].values()} == set(kinds.objectives)
    seen = {one["kind"] for one in data["data"]["sources"].values()}
    data["data"]["sources"]["images"] = tiny_config(sources, run_dir)["data"]["sources"]["image"]
    data["objectives"]["more"] = {"kind": "spread", "source": "images"}
    assert seen | {"image"} == set(kinds.sources)
    config = str(write_config(data, tmp_path / "run.yaml"))

    assert str(run_dir) in command("train", config, "--check")
    command("plan", config, "--world-size", "2", "--json", str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is True
    packing = command("inspect", config, "--replicas", "2", "--steps", "2")
    assert "padding" in packing and "data.text_tokens_per_microbatch" in packing
    command("train", config, "--set", "train.stop_after_steps=2")
    assert "Resumed" in command("train", config)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {f"loss/{name}" for name in data["objectives"]} <= rows[0].keys()

    described = command("inspect", str(run_dir))
    assert encoder in described and "parameters of bright" in described and "11 classes" in described
    checkpoint = str(run_dir / "checkpoints" / "step_00000003")
    command("convert", "export", "--checkpoint", checkpoint, "--output", str(tmp_path / "export"), "--average")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "brightness" in card and "11 classes" in card
    assert "to write text down, by a llama decoder of 1 layers" in card and "to keep the features of teacher" in card


def test_fields_of_a_plugin_are_checked_as_others(sources: dict[str, str], tmp_path: Path) -> None:
    data = toy_config(sources, tmp_path, encoder="mixer")
    data["objectives"]["bright"]["loss_wieght"] = 2.0
    data["encoder"]["ffn_hidden_size"] = "wide"
    data["data"]["sources"]["pictures"]["kind"] = "thirds"
    with pytest.raises(ConfigError) as error:
        config_from_dict(data, "run.yaml")
    text = str(error.value)
    assert "run.yaml has 3 errors" in text
    assert "unknown key 'objectives.bright.loss_wieght'; did you mean 'loss_weight'?" in text
    assert "encoder.ffn_hidden_size = 'wide' is a text, but a whole number is needed" in text
    assert (
        "data.sources.pictures.kind = 'thirds' is not one of the known values; use image, ocr, document, video, halves"
        in text
    )
    fields = set(field_paths(load_kinds(tuple(data["plugins"])).train_config))
    assert any(field.startswith("objectives.<name>[spread].loss_weight") for field in fields)


@pytest.mark.parametrize(
    ("plugins", "sentence"),
    [
        (
            ["nowhere.to.be.found"],
            "plugins: nowhere.to.be.found cannot be imported (No module named 'nowhere')",
        ),
        (["json"], "plugins: json has none of ENCODERS, OBJECTIVES and SOURCES, so it adds nothing; name the module"),
        (["megatron_ove.catalog"], "plugins: megatron_ove.catalog is there already; name each module once, and none"),
        (["json", "json"], "plugins: json is there already; name each module once, and none of this package"),
        ([""], "plugins: '' cannot be imported (ValueError: Empty module name); correct the name or the module"),
        ([".x"], "plugins: '.x' cannot be imported (TypeError: "),
        (["tests.support.toys.brightness", "same_kinds"], "plugins: same_kinds describes the kind 'brightness' in OBJ"),
        (["failing_kinds"], "plugins: 'failing_kinds' cannot be imported (ZeroDivisionError: division by zero); corr"),
        (["listed_kinds"], "plugins: ENCODERS of listed_kinds is not a dictionary of names and EncoderKinds; write it"),
        (["other_kinds"], "plugins: SOURCES of other_kinds is not a dictionary of names and SourceKinds; write it as"),
    ],
)
def test_plugins_that_are_none(
    plugins: list[str], sentence: str, sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {
        "same_kinds": "from tests.support.toys.brightness import OBJECTIVES",
        "failing_kinds": "1 / 0",
        "listed_kinds": "ENCODERS = ['a']",
        "other_kinds": "SOURCES = {'a': 3}",
    }
    for name, content in modules.items():
        (tmp_path / f"{name}.py").write_text(content + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    data: dict[str, Any] = {**tiny_config(sources, tmp_path), "plugins": plugins}
    with pytest.raises(ConfigError) as error:
        config_from_dict(data, "run.yaml")
    assert str(error.value).startswith(sentence)


def test_a_kind_without_its_plugin_is_a_sentence(sources: dict[str, str], tmp_path: Path) -> None:
    data = toy_config(sources, tmp_path, encoder="onevision")
    data["plugins"] = yaml.safe_load("[]")
    with pytest.raises(ConfigError) as error:
        config_from_dict(data, "run.yaml")
    text = "data.sources.pictures.kind = 'halves' is not one of the known values; use image, ocr, document, video"
    assert text in str(error.value)
