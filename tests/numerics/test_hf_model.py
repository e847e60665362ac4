"""The exported model as a transformers model: configuration, initialisation, outputs, errors, imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from megatron_ove import hf_model as hf_model_package
from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.convert.hf_config import to_hf_config
from megatron_ove.convert.mapping import hf_shapes
from megatron_ove.hf_model.configuration_onevision_encoder import OneVisionEncoderConfig
from megatron_ove.hf_model.modeling_onevision_encoder import OneVisionEncoderModel
from tests.support.hf_models import hf_model
from tests.support.tiny import tiny_encoder_config

CODE_DIR = Path(hf_model_package.__file__).parent


def test_configuration_keys_and_defaults_are_the_published_ones() -> None:
    published = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 448,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layer_norm_type": "layer_norm",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_theta": 10000.0,
        "rope_temporal_size": 64,
        "use_head": True,
    }
    config = OneVisionEncoderConfig()
    assert {name: getattr(config, name) for name in published} == published
    assert config.to_dict()["model_type"] == "onevision_encoder"
    large = EncoderConfig(hidden_size=1024, num_layers=24, num_attention_heads=16, ffn_hidden_size=4096)
    written = to_hf_config(large, image_size=448, dtype=torch.float32)
    assert {name: written[name] for name in published} == published


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 24}, "hidden_size / num_attention_heads = 1024 / 24 is not a multiple of 32, which"),
        ({"num_attention_heads": 64}, "1024 / 64 is not a multiple of 32, which the split of the rotary channels"),
        ({"layer_norm_type": "batch"}, "layer_norm_type = 'batch' is unknown; use 'layer_norm' or 'rms_norm'"),
    ],
)
def test_impossible_configurations(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneVisionEncoderConfig(**changes)


@pytest.mark.parametrize(
    ("size", "num_tensors", "num_parameters"),
    [((768, 12, 12, 3072), 207, 92_595_456), ((1024, 24, 16, 4096), 399, 315_509_760), ((1280, 32, 20, 5120), 527, 0)],
)
def test_published_sizes(size: tuple[int, int, int, int], num_tensors: int, num_parameters: int) -> None:
    names = ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size")
    config = EncoderConfig(**dict(zip(names, size, strict=True)))
    num_parameters = num_parameters or 650_110_720
    with torch.device("meta"):
        model = hf_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == hf_shapes(config)
    assert len(shapes) == num_tensors
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == num_parameters
    assert not list(model.buffers())


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = hf_model(tiny_encoder_config(hidden_size=128, ffn_hidden_size=512, patch_size=8))
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        elif name == "head.probe":
            assert 0.8 < tensor.std() < 1.2
        elif name == "head.attention.in_proj_weight":  # Xavier: uniform within sqrt(6 / (3 h + h))
            bound = (6 / (4 * 128)) ** 0.5
            assert tensor.abs().max() <= bound and abs(tensor.std() - bound / 3**0.5) < 0.002
        else:
            assert abs(tensor.std() - 0.02) < 0.001, name


@pytest.fixture(scope="module")
def model() -> OneVisionEncoderModel:
    return hf_model(tiny_encoder_config(num_layers=1))


@torch.no_grad()
def test_attention_weights_of_eager(model: OneVisionEncoderModel) -> None:
    eager = hf_model(tiny_encoder_config(num_layers=2), attention="eager")
    output = eager(torch.randn(2, 3, 8, 12), output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 6, 6)] * 2
    assert (output.attentions[0].sum(-1) - 1).abs().max() < 1e-6
    with pytest.raises(
        ValueError, match="sdpa never forms attention weights; load the model with attn_implementation='eager'"
    ):
        model(torch.randn(1, 3, 8, 12), output_attentions=True)


@torch.no_grad()
def test_plain_tuple(model: OneVisionEncoderModel) -> None:
    pixels = torch.randn(1, 3, 8, 12)
    last, pooled = model(pixels, return_dict=False)
    output = model(pixels)
    assert torch.equal(last, output.last_hidden_state) and torch.equal(pooled, output.pooler_output)


def test_flash_attention_is_declared_unsupported() -> None:
    with pytest.raises((ValueError, ImportError), match=r"(?i)flash.?attention"):
        hf_model(tiny_encoder_config(), attention="flash_attention_2")


SHAPE_ERRORS = [
    ({"pixel_values": torch.zeros(3, 8, 8)}, r"pixel_values has the shape \(3, 8, 8\), but \[B, 3, H, W\] \(images\)"),
    ({"pixel_values": torch.zeros(1, 1, 8, 8)}, r"shape \(1, 1, 8, 8\), but \[B, 3, H, W\]"),
    ({"pixel_values": torch.zeros(1, 3, 8, 3)}, r"which holds no whole patch of 4 x 4 pixels"),
    ({"visible_indices": torch.zeros(6, dtype=torch.long)}, r"visible_indices has the shape \(6,\), but \[1, S\] is"),
    (
        {"visible_indices": torch.zeros(1, 0, dtype=torch.long)},
        r"shape \(1, 0\), but \[1, S\] is needed, with the same",
    ),
    (
        {"visible_indices": torch.tensor([[0, 12]])},
        r"visible_indices reaches from 0 to 12, but there are only 2 x 2 x 3 = 12 patches in the picture; count t",
    ),
    ({"visible_indices": torch.tensor([[-1, 3]])}, r"reaches from -1 to 3, but there are only 2 x 2 x 3 = 12 patches"),
    (
        {"visible_indices": torch.arange(12)[None] + 64 * 6 - 11},
        r"reaches from 373 to 384, but there are only 64 x 2 x 3 = 384 places on the position grid",
    ),
    (
        {"patch_positions": torch.zeros(1, 5, 3)},
        r"patch_positions has the shape \(1, 5, 3\), but \[1, 12, 3\] is needed",
    ),
    (
        {"patch_positions": torch.zeros(1, 12, 3), "visible_indices": torch.tensor([[0, 1]])},
        r"shape \(1, 12, 3\), but \[1, 2, 3\] is needed: one \(t, h, w\) for each encoded patch",
    ),
    (
        {"pixel_values": torch.zeros(1, 3, 65, 4, 4)},
        r"the clip has 65 frames, but rope_temporal_size = 64, so the last ones have no position",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), SHAPE_ERRORS)
def test_what_does_not_fit_gets_a_sentence(model: OneVisionEncoderModel, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**{"pixel_values": torch.zeros(1, 3, 2, 8, 12), **arguments})


@torch.no_grad()
def test_without_a_temporal_grid_a_clip_counts_its_own_frames() -> None:
    model = hf_model(tiny_encoder_config(num_layers=1), rope_temporal_size=None)
    clip = torch.randn(1, 3, 65, 4, 8)
    positions = torch.cartesian_prod(torch.arange(65), torch.arange(1), torch.arange(2))
    assert torch.equal(model(clip).pooler_output, model(clip, patch_positions=positions[None]).pooler_output)
    with pytest.raises(ValueError, match="only 2 x 2 x 3 = 12 places on the position grid"):
        model(torch.zeros(1, 3, 2, 8, 12), visible_indices=torch.arange(12)[None] + 1)


def test_code_imports_only_torch_and_transformers() -> None:
    allowed = {"__future__", "collections", "torch", "transformers", "typing"}
    for file in CODE_DIR.glob("*_onevision_encoder.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module == "configuration_onevision_encoder"


@torch.no_grad()
def test_the_kind_of_attention_can_be_changed_later() -> None:
    """In every sub-module: weights appear, the pooling head's attention changes too, and the numbers stay."""
    model, pixels = hf_model(tiny_encoder_config(num_layers=2)), torch.randn(2, 3, 8, 12)
    before, calls = model(pixels), []
    with pytest.MonkeyPatch.context() as patch:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **options: (calls.append(1), sdpa(*args))[1],
        )
        model.set_attn_implementation("eager")
        eager = model(pixels, output_attentions=True)
        assert model.config._attn_implementation == "eager" and not calls
        model.set_attn_implementation("sdpa")
        again = model(pixels)
        assert len(calls) == 3  # two layers and the head
    assert [tuple(weights.shape) for weights in eager.attentions] == [(2, 2, 6, 6)] * 2
    assert (eager.pooler_output - before.pooler_output).abs().max() < 1e-5
    assert torch.equal(again.pooler_output, before.pooler_output)
    with pytest.raises(ValueError, match="sdpa never forms attention weights"):
        model(pixels, output_attentions=True)
    with pytest.raises((ValueError, ImportError), match=r"(?i)flash.?attention"):
        model.set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_empty_batch_gives_an_empty_result(attention: str) -> None:
    """Also backwards, as the last, empty share of a data set meets it."""
    model = hf_model(tiny_encoder_config(num_layers=2), attention=attention)
    for arguments, num_tokens in (
        ({"pixel_values": torch.zeros(0, 3, 8, 12)}, 6),
        ({"pixel_values": torch.zeros(0, 3, 2, 8, 12)}, 12),
        (
            {
                "pixel_values": torch.zeros(0, 3, 2, 8, 12),
                "visible_indices": torch.zeros(0, 5, dtype=torch.long),
                "output_hidden_states": True,
            },
            5,
        ),
        ({"pixel_values": torch.zeros(0, 3, 8, 12), "patch_positions": torch.zeros(0, 6, 3, dtype=torch.long)}, 6),
    ):
        output = model(**arguments)
        assert output.last_hidden_state.shape == (0, num_tokens, 64) and output.pooler_output.shape == (0, 64)
        output.pooler_output.sum().backward()
    if attention == "eager":
        weights = model(torch.zeros(0, 3, 8, 12), output_attentions=True).attentions
        assert [tuple(item.shape) for item in weights] == [(0, 2, 6, 6)] * 2


@torch.no_grad()
def test_one_graph_with_chosen_patches(model: OneVisionEncoderModel) -> None:
    """`torch.compile(fullgraph=True)`: no break, the same numbers, and an index beyond the picture ends the run."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    clip = torch.randn(2, 3, 2, 8, 12)
    for indices in (torch.tensor([[0, 7], [3, 11]]), torch.arange(12).expand(2, -1) + 6):
        expected, actual = model(clip, visible_indices=indices), compiled(clip, visible_indices=indices)
        assert torch.allclose(expected.pooler_output, actual.pooler_output, atol=1e-6)
    with pytest.raises(RuntimeError, match="visible_indices leaves the 12 patches in the picture"):
        compiled(clip, visible_indices=torch.tensor([[0, 12], [0, 1]]))
    with pytest.raises(RuntimeError, match="visible_indices leaves the 384 places on the position grid"):
        compiled(clip, visible_indices=torch.arange(12).expand(2, -1) + 64 * 6)
