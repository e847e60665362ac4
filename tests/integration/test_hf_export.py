"""From a checkpoint of any layout to a HuggingFace folder and back into AutoModel, through the command line.

Runs under the installed transformers, and once more under transformers 5 (test_hf_transformers5.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from megatron_ove.cli.main import main
from megatron_ove.convert.checkpoint_files import encoder_state_from_checkpoint
from megatron_ove.convert.class_centers import load_class_head
from megatron_ove.convert.encoder_inference import load_encoder_for_inference
from megatron_ove.convert.hf_config import from_hf_config
from megatron_ove.convert.hf_export import export_checkpoint
from megatron_ove.convert.hf_import import import_pretrained
from megatron_ove.convert.mapping import hf_shapes
from megatron_ove.errors import CheckpointError
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.distributed import run_distributed
from tests.support.hf_models import strip_of
from tests.support.run_checkpoints import PATCH, class_table, write_in_layout, write_run_checkpoint
from tests.support.tiny import codec_clip_sample, image_sample, make_pack
from tests.support.tiny_run import NUM_CLASSES

LAYOUT = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
FILES = {
    "README.md",
    "config.json",
    "configuration_onevision_encoder.py",
    "model.safetensors",
    "modeling_onevision_encoder.py",
    "preprocessor_config.json",
}
# The same fp32 sums in another order, on outputs of order 1.
FP32_TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies remote code into the user's home otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="module")
def checkpoint(topology: ParallelTopology, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_checkpoint(topology, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny-encoder"
    assert main(["convert", "export", "--checkpoint", str(checkpoint), "--output", str(folder)]) == 0
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **options).eval()


def test_runs_under_the_transformers_it_is_meant_for() -> None:
    assert transformers.__version__ == os.environ.get("EXPECTED_TRANSFORMERS", version("transformers"))


def test_command_says_where_and_how_to_load(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{tmp_path / 'out'}\n")
    assert f'AutoModel.from_pretrained("{tmp_path / "out"}", trust_remote_code=True)' in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_folder_has_every_file_and_the_published_names(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    config = json.loads((exported / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_onevision_encoder.OneVisionEncoderModel"
    assert config["architectures"] == ["OneVisionEncoderModel"] and config["image_size"] == 28
    assert config["rope_temporal_size"] == 16 and config["dtype"] == "float32"
    tensors = load_file(exported / "model.safetensors")
    expected = hf_shapes(from_hf_config(config, origin="config.json"))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_rights_of_the_umask(checkpoint: Path, tmp_path: Path, umask: int, rights: int) -> None:
    """Of the export and of an imported checkpoint, so that whoever may read one file may read all."""
    before = os.umask(umask)
    try:
        folder = export_checkpoint(checkpoint, tmp_path / "new" / "out")
        imported = import_pretrained(folder, tmp_path / "new" / "imported")
    finally:
        os.umask(before)
    for path in (folder, imported, *folder.rglob("*"), *imported.rglob("*")):
        executable = (rights & 0o444) >> 2 if path.is_dir() else 0
        assert stat.S_IMODE(path.stat().st_mode) == rights | executable, path


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_auto_model_equals_the_trained_encoder(
    exported: Path, checkpoint: Path, topology: ParallelTopology, attention: str
) -> None:
    encoder, config = load_encoder_for_inference(checkpoint, topology=topology)
    assert config.hidden_size == 64
    samples = [
        image_sample(3, 2, patch_size=PATCH),
        (image_sample(4, 4, seed=1, patch_size=PATCH)[0], codec_clip_sample(16, 2, 3, seed=2)[1]),
    ]
    features = encoder(make_pack(samples, num_patches=40, patch_size=PATCH))
    model = load(exported, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert not list(model.buffers())
    for index, (patches, positions) in enumerate(samples):
        output = model(strip_of(patches, PATCH), patch_positions=positions[None])
        assert output.pooler_output.std() > 0.1
        assert (output.pooler_output[0] - features.pooled[index]).abs().max() <= FP32_TOLERANCE


@torch.no_grad()
def test_nothing_comes_from_uninitialised_memory(exported: Path) -> None:
    """Loading with every new tensor filled with NaN gives the same model, bit for bit."""
    pixels, outputs, states = torch.randn(1, 3, 2, 28, 42), [], []
    for poisoned in (False, True):
        torch.use_deterministic_algorithms(poisoned)
        assert torch.utils.deterministic.fill_uninitialized_memory
        try:
            assert not poisoned or torch.empty(1000).isnan().all()
            model = load(exported)
        finally:
            torch.use_deterministic_algorithms(False)
        outputs.append(model(pixels))
        states.append(model.state_dict())
    stored = load_file(exported / "model.safetensors")
    for state in states:
        assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)
    assert torch.equal(outputs[0].last_hidden_state, outputs[1].last_hidden_state)
    assert torch.equal(outputs[0].pooler_output, outputs[1].pooler_output)


def test_missing_weights_are_initialised_and_loaded_ones_left_alone(exported: Path, tmp_path: Path) -> None:
    """Even in a module of which one tensor was loaded and another was not."""
    folder = shutil.copytree(exported, tmp_path / "partial")
    stored = load_file(folder / "model.safetensors")
    missing = ["encoder.layers.1.layer_norm1.bias", "encoder.layers.2.mlp.fc1.weight", "head.attention.in_proj_weight"]
    kept = {name: tensor for name, tensor in stored.items() if name not in missing}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    state = load(folder).state_dict()
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert not state[missing[0]].any()
    assert abs(state[missing[1]].std() - 0.1) < 0.01
    assert 0.08 < state[missing[2]].std() < 0.1  # sqrt(6 / 256) / sqrt(3)


@torch.no_grad()
def test_card_tells_the_truth(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs as it is printed, and its facts are the run's."""
    card = (exported / "README.md").read_text()
    assert "20 of 20 steps, 160 samples (8 a step), fp32, seed 11" in card
    assert (
        "| image | image | 2 |" in card and "| video_labels | partial_fc | video | 7 classes, cosface 0.3 | 2 |" in card
    )
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "red").save("picture.jpg")
    scope: dict[str, Any] = {"frames": torch.randn(3, 3, 28, 28), "index": [0, 10, 99], "length": 100}
    scope["patches"] = torch.randn(12, 3, PATCH, PATCH)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3
    for block, num_tokens in zip(blocks, (4, 12, 12), strict=True):
        exec(block.replace("FOLDER", str(exported)), scope)
        assert scope["output"].last_hidden_state.shape == (1, num_tokens, 64)
    assert scope["places"][:, 0].unique().tolist() == [0, 2, 15]


def test_image_processor(exported: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(exported)
    picture = Image.new("RGB", (60, 40), (255, 0, 0))
    pixels = processor(images=picture, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 28, 28)
    expected = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    assert (pixels[0, :, 5, 5] - expected).abs().max() < 1e-5


def test_auto_config_and_save_pretrained_keep_everything(exported: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    written = json.loads((exported / "config.json").read_text())
    assert config.num_hidden_layers == 4 and config.intermediate_size == 96
    model = load(exported)
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert {name: again.get(name) for name in written if name != "auto_map"} == {
        name: value for name, value in written.items() if name != "auto_map"
    }
    stored, saved = load_file(exported / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert stored.keys() == saved.keys() and all(torch.equal(stored[name], saved[name]) for name in stored)


def test_layout_of_the_checkpoint_does_not_matter(checkpoint: Path, tmp_path: Path) -> None:
    (other, *_) = run_distributed(write_in_layout, 4, str(tmp_path), LAYOUT)
    expected, config = encoder_state_from_checkpoint(checkpoint)
    actual, other_config = encoder_state_from_checkpoint(other)
    assert config == other_config and actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for kind, num_classes in NUM_CLASSES.items():
        assert torch.equal(load_class_head(other, f"{kind}_labels").centers, class_table(num_classes))


def test_bf16_stays_bf16(topology: ParallelTopology, tmp_path: Path) -> None:
    checkpoint = write_run_checkpoint(topology, tmp_path / "run", dtype=torch.bfloat16)
    folder = export_checkpoint(checkpoint, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    model = load(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model(torch.zeros(1, 3, 28, 28)).pooler_output.isfinite().all()


def damage(checkpoint: Path, folder: Path) -> Path:
    copy = shutil.copytree(checkpoint, folder / checkpoint.name)
    file = next(iter(sorted(copy.glob("*.distcp"))))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return copy


def test_damaged_or_wrong_checkpoints_get_a_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = damage(checkpoint, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"cannot be used as a checkpoint: its file \S+ has the checksum \w+ inst"
    ):
        export_checkpoint(damaged, tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"has no manifest\.json, which is written last and deleted first; name a finished folder"
    ):
        export_checkpoint(checkpoint.parent, tmp_path / "out")
    assert main(["convert", "export", "--checkpoint", str(tmp_path / "no"), "--output", str(tmp_path / "out")]) == 2
    assert "name a finished folder like runs/NAME/checkpoints/step_00000100" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="no class centers of an objective 'words'; its objectives are image_lab"):
        load_class_head(checkpoint, "words")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"out exists already and would be overwritten; name another folder, or d"
    ):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]
