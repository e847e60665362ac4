"""`--model-folder`: vision models of many kinds describe as they do by hand, our own exports too, and the rest is a
sentence before the first picture. Tiny random models.
"""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from megatron_ove.convert.hf_config import to_hf_config
from megatron_ove.convert.hf_folder import write_hf_folder
from megatron_ove.errors import DataError
from megatron_ove.preprocess.clustering.descriptor_sets import DescriptorSet, PictureDescriber
from megatron_ove.preprocess.clustering.descriptors import build_describer
from tests.support.clips import textured_background
from tests.support.hf_models import matched_model, reference_with_busy_weights
from tests.support.tiny import tiny_encoder_config
from tests.support.tool_scripts import run_script

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
CLIP_PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
VIT_PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})
ENCODER = tiny_encoder_config(num_layers=2)


def clip() -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SIZES, projection_dim=16))


def dinov2() -> Dinov2Model:
    return Dinov2Model(Dinov2Config(**{**SIZES, "image_size": 28, "patch_size": 14}))


def convnext() -> ConvNextModel:
    return ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]))


def resnet() -> ResNetModel:
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).train()


# name -> (model, processor, number of values, features of its output)
KINDS: dict[str, tuple[Callable[[], Any], Any, int, Callable[[Any, Any], torch.Tensor]]] = {
    "clip": (clip, CLIP_PROCESSOR, 16, lambda model, pixels: model.get_image_features(pixel_values=pixels)[0]),
    "clip_vision": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)),
        CLIP_PROCESSOR,
        32,
        lambda model, pixels: model(pixels).pooler_output[0],
    ),
    "vit": (lambda: ViTModel(ViTConfig(**SIZES)), VIT_PROCESSOR, 32, lambda model, x: model(x).pooler_output[0]),
    "vit without pooler": (
        lambda: ViTModel(ViTConfig(**SIZES), add_pooling_layer=False),
        VIT_PROCESSOR,
        32,
        lambda model, pixels: (
            model.vit(pixels).last_hidden_state[0].mean(0)
            if hasattr(model, "vit")
            else model(pixels).last_hidden_state[0].mean(0)
        ),
    ),
    "dinov2": (
        dinov2,
        BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        32,
        lambda model, pixels: model(pixels).pooler_output[0],
    ),
    "convnext": (
        convnext,
        ConvNextImageProcessor(size={"shortest_edge": 64}),
        32,
        lambda model, pixels: model(pixels).pooler_output[0].flatten(),
    ),
    "resnet": (
        resnet,
        ConvNextImageProcessor(size={"shortest_edge": 64}),
        16,
        lambda model, pixels: model(pixels).pooler_output[0, :, 0, 0],
    ),
}


def save(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def vit(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    return save(folder, ViTModel(ViTConfig(**{**SIZES, **changes})), VIT_PROCESSOR)


@pytest.fixture(scope="module", autouse=True)
def own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies remote code into the user's home otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="module")
def own_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference = reference_with_busy_weights(ENCODER)
    state = {name: value.detach() for name, value in reference.state_dict().items()}
    values = to_hf_config(ENCODER, image_size=32, dtype=torch.float32)
    return write_hf_folder(tmp_path_factory.mktemp("own") / "encoder", state, values, model_card="# test\n")


@pytest.mark.parametrize("kind", KINDS)
def test_models_describe_like_by_hand(tmp_path: Path, kind: str) -> None:
    """Also a picture of 1 or 3 rows, in which the processors take rows for channels unless they are told."""
    make, processor, size, features = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    save(tmp_path, model, processor)
    describer = build_describer(tmp_path)
    for height, width in ((48, 40), (1, 40), (3, 40), (40, 1), (40, 3), (3, 3)):
        picture = textured_background(64, 64)[:height, :width]
        pixels = processor(images=picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        with torch.no_grad():
            expected = features(model.eval(), pixels).numpy()
        actual = describer.describe(picture)
        assert actual.shape == (size,) and actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected / np.linalg.norm(expected), atol=1e-5)


def test_a_hairline_needs_no_more_memory_than_a_picture(tmp_path: Path) -> None:
    """Scaled by its shorter side, a picture of 1 x 300,000 pixels would become 30 million pixels."""
    describer = build_describer(save(tmp_path, CLIPVisionModel(CLIPVisionConfig(**SIZES)), CLIP_PROCESSOR))
    line = np.random.default_rng(0).integers(0, 256, (1, 300_000, 3), dtype=np.uint8)
    np.testing.assert_array_equal(describer.describe(line), describer.describe(line[:, 149_968:150_032]))
    np.testing.assert_array_equal(
        describer.describe(line.transpose(1, 0, 2)), describer.describe(line[:, 149_968:150_032].transpose(1, 0, 2))
    )


def test_half_precision_describes_in_fp32(tmp_path: Path) -> None:
    model = CLIPVisionModel(CLIPVisionConfig(**SIZES)).to(torch.bfloat16)
    half = build_describer(save(tmp_path / "half", model, CLIP_PROCESSOR))
    full = build_describer(save(tmp_path / "full", model.float(), CLIP_PROCESSOR))
    picture = textured_background(48, 48)
    np.testing.assert_array_equal(half.describe(picture), full.describe(picture))


def test_a_classifier_without_pooler_is_described_by_its_tokens(tmp_path: Path) -> None:
    """Its folder lacks the pooler of a plain ViT, which would be random, and different in every process."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES)).eval()
    save(tmp_path, model, VIT_PROCESSOR)
    picture = textured_background(48, 48)
    with torch.no_grad():
        tokens = model.vit(VIT_PROCESSOR(images=picture, return_tensors="pt")["pixel_values"]).last_hidden_state[0]
    expected = tokens.mean(0).numpy()
    for _ in range(2):
        actual = build_describer(tmp_path).describe(picture)
        np.testing.assert_allclose(actual, expected / np.linalg.norm(expected), atol=1e-5)


def test_our_own_export_needs_no_remote_code(own_export: Path, tmp_path: Path) -> None:
    """The class of this package is used, whatever the folder's code does."""
    folder = shutil.copytree(own_export, tmp_path / "copy")
    (folder / "modeling_onevision_encoder.py").write_text("raise SystemExit('this code ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "somebody/elsewhere--modeling.Model"
    (folder / "config.json").write_text(json.dumps(config))
    picture = textured_background(48, 40)
    processor = CLIPImageProcessor.from_pretrained(folder)
    pixels = processor(images=picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    with torch.no_grad():
        expected = matched_model(reference_with_busy_weights(ENCODER))(pixels).pooler_output[0].numpy()
    for trust in (False, True):
        describer = build_describer(folder, trust_remote_code=trust)
        np.testing.assert_allclose(describer.describe(picture), expected / np.linalg.norm(expected), atol=1e-5)
        assert describer.name.startswith("model:onevision_encoder:")


def test_code_of_a_folder_runs_only_when_asked(own_export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(own_export, tmp_path / "other")
    for file in folder.glob("*.py"):
        file.write_text(file.read_text().replace('model_type = "onevision_encoder"', 'model_type = "other_encoder"'))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "other_encoder"}))
    with pytest.raises(DataError, match=r"needs Python code that lies in its folder, .* give --trust-remote-code"):
        build_describer(folder)
    changed = shutil.copytree(folder, tmp_path / "changed")
    with (changed / "modeling_onevision_encoder.py").open("a") as stream:
        stream.write("# changed\n")
    names = [build_describer(place, trust_remote_code=True).name for place in (folder, changed)]
    assert all(name.startswith("model:other_encoder:") for name in names) and names[0] != names[1]


def test_a_name_is_of_the_content(tmp_path: Path) -> None:
    first, second = vit(tmp_path / "a" / "model"), vit(tmp_path / "b" / "model", layer_norm_eps=1e-3)
    name = build_describer(first).name
    assert name != build_describer(second).name
    moved = shutil.copytree(first, tmp_path / "elsewhere")
    (moved / "README.md").write_text("another card")
    config = json.loads((moved / "config.json").read_text())
    config.update(_name_or_path="/old/place", transformers_version="4.0.0")
    (moved / "config.json").write_text(json.dumps(config))
    assert build_describer(moved).name == name
    weights = load_file(moved / "model.safetensors")
    weights["layernorm.bias"][0] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert build_describer(moved).name != name
    settings = json.loads((first / "preprocessor_config.json").read_text())
    (first / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.4, 0.4, 0.4]}))
    assert build_describer(first).name != name


def test_weights_in_several_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    VIT_PROCESSOR.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    name = build_describer(tmp_path).name
    weights = load_file(files[-1])
    key = next(key for key in weights if key.endswith("bias"))
    weights[key][0] += 1
    save_file(weights, files[-1], metadata={"format": "pt"})
    assert build_describer(tmp_path).name != name
    files[-1].unlink()
    with pytest.raises(DataError, match="cannot be used: it cannot be loaded"):
        build_describer(tmp_path)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


def fill(folder: Path, value: float) -> None:
    weights = {name: torch.full_like(tensor, value) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json, so it is no HuggingFace model"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be used: it cannot be read .*is no JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "it cannot be read .*holds no JSON object"),
        (lambda folder: (folder / "config.json").write_text("{}"), "it cannot be loaded .*Unrecognized model"),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            r"has no preprocessor_config\.json, which",
        ),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "its image processor cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it cannot be loaded .*no file named"),
        (cut, r"it cannot be loaded \(SafetensorError"),
        (drop, r"lacks 1 of its model's weights, e\.g\. encoder\.layer\.0\.output\.dense\.weight"),
        (lambda folder: fill(folder, float("nan")), "gives values that are not finite, so its weights are damaged"),
        (lambda folder: fill(folder, 0.0), "gives the same values for pictures that have nothing in common"),
    ],
)
def test_a_folder_that_cannot_describe_is_one_sentence(tmp_path: Path, damage: Any, message: str) -> None:
    vit(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(DataError, match=message) as caught:
        build_describer(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_a_settings_file_that_is_no_json_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    folder = vit(tmp_path / "model")
    (folder / "processor_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"processor_config\.json is no JSON \(.*; get that file again, or delete it"):
        _ = build_describer(folder).name


def test_a_text_model_is_one_sentence(tmp_path: Path) -> None:
    save(tmp_path, BertModel(BertConfig(**TEXT)), None)
    with pytest.raises(DataError, match="is of type 'bert', which takes input_ids and not pictures; give a vision"):
        build_describer(tmp_path)


def test_the_tool_describes_with_our_own_export(
    own_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that cannot is an error of the command and not a reject of every picture."""
    for number, size in enumerate([(40, 30), (30, 1), (7, 50)]):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(textured_background(64, 64)[: size[1], : size[0]]).save(tmp_path / f"pictures/{number}.png")
    tool, pictures = "clustering/1_describe_pictures.py", tmp_path / "pictures"
    options = ("--workers", 1, "--rejects", tmp_path / "rejects.jsonl", "--model-folder")
    assert run_script(tool, pictures, tmp_path / "a.npz", *options, own_export) == 0
    described = DescriptorSet.load(tmp_path / "a.npz")
    assert described.descriptors.shape == (3, 64) and np.isfinite(described.descriptors).all()
    assert described.describer == build_describer(own_export).name
    vit(tmp_path / "model")
    cut(tmp_path / "model")
    capsys.readouterr()
    assert run_script(tool, pictures, tmp_path / "b.npz", *options, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: the model folder {tmp_path / 'model'} cannot be used") and error.count("\n") == 1


def test_workers_get_the_same_model(own_export: Path) -> None:
    make_task = functools.partial(PictureDescriber, own_export, trust_remote_code=True)
    assert pickle.loads(pickle.dumps(make_task)).keywords == {"trust_remote_code": True}
