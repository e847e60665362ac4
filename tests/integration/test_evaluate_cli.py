"""`megatron-ove evaluate` on an exported model: what it prints and writes, and at which picture size it looks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ove.cli.main import main
from megatron_ove.convert.hf_config import to_hf_config
from megatron_ove.convert.hf_folder import write_hf_folder
from megatron_ove.data.synthetic import write_synthetic_shard_set
from megatron_ove.evaluation import embedding
from tests.support.reference_encoder import ReferenceEncoder
from tests.support.tiny import tiny_encoder_config

IMAGE_SIZE = 40
CONFIG = tiny_encoder_config(num_layers=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state: dict[str, Tensor] = {name: value.detach() for name, value in ReferenceEncoder(CONFIG).state_dict().items()}
    values = to_hf_config(CONFIG, image_size=IMAGE_SIZE, dtype=torch.float32)
    return write_hf_folder(tmp_path_factory.mktemp("model") / "encoder", state, values, model_card="# test\n")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "images"
    return write_synthetic_shard_set(folder, kind="image", num_samples=12, num_classes=4, label_width=2)


@pytest.mark.parametrize(("options", "side"), [([], IMAGE_SIZE), (["--image-size", "28"], 28)])
def test_figures_at_the_size_of_the_training_unless_told(
    model: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    side: int,
) -> None:
    patches: list[int] = []
    make_batch = embedding._make_batch

    def watched(source: Any, rows: Any, counts: Any) -> Any:
        patches.extend(counts.tolist())
        return make_batch(source, rows, counts)

    monkeypatch.setattr(embedding, "_make_batch", watched)
    output = tmp_path / "figures.json"
    command = ["evaluate", "--model", str(model), "--shards", str(shards), "--k", "2", "--output", str(output)]
    assert main([*command, "--group-pattern", "^image(....)", *options]) == 0
    assert patches == [(side // CONFIG.patch_size) ** 2] * 12
    figures = json.loads(output.read_text())
    assert set(figures) == {"neighbours", "groups"}
    assert figures["neighbours"]["queries"] == 12
    assert all(math.isfinite(value) for family in figures.values() for value in family.values())
    assert capsys.readouterr().out.startswith(f"12 samples of {shards}\nneighbours  label overlap at 2 ")


def test_a_checkpoint_needs_its_objective(model: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(model), "--shards", str(shards), "--checkpoint", "somewhere"]) == 2
    assert "--checkpoint and --objective name a table of class centers together; give both" in capsys.readouterr().err


def _without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm_pre.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "its config.json is no JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "has model_type = None instead of 'onevision_enc"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "Error while deserializing header"),
        (lambda folder: (folder / "model.safetensors").unlink(), "Error no file named"),
        (lambda folder: _without_a_weight(folder), "1 of its weights are missing, e.g. layernorm_pre.bias"),
    ],
)
def test_a_damaged_model_is_a_sentence(
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, reason: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    damage(folder)
    assert main(["evaluate", "--model", str(folder), "--shards", str(shards)]) == 2
    text = capsys.readouterr().err
    assert f"megatron-ove: {folder} cannot be loaded as an exported model (" in text and reason in text
    assert "give a folder that megatron-ove convert export made, or make it again" in text


def test_code_of_the_folder_does_not_run(model: Path, shards: Path, tmp_path: Path) -> None:
    """Neither that in the folder nor that in a repository which its config.json names."""
    folder = shutil.copytree(model, tmp_path / "copy")
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('this code ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {name: f"somebody/elsewhere--{place}" for name, place in config["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    figures = []
    for name in (model, folder):
        output = tmp_path / "figures.json"
        command = ["evaluate", "--model", str(name), "--shards", str(shards), "--k", "2", "--output", str(output)]
        assert main(command) == 0
        figures.append(output.read_text())
    assert figures[0] == figures[1]
