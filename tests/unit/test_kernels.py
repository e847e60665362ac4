"""Which kernels a machine gets: what is chosen, what is said, what is refused. The machines are made up."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ove.config.fp8 import FP8_RECIPES
from megatron_ove.errors import ConfigError
from megatron_ove.model import kernels
from megatron_ove.model.kernels import EncoderKernels, fp8_obstacle, resolve_kernels
from megatron_ove.model.transformer_config import build_transformer_config, fp8_fields
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.tiny import tiny_encoder_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER, BLACKWELL = (9, 0), (10, 0)
ENGINE = {"transformer_engine", "transformer_engine.pytorch"}
FLASH = {"flash_attn"}
APEX = {"apex", "apex.normalization.fused_layer_norm", "fused_weight_gradient_mlp_cuda"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes up a CUDA machine: machine(modules that can be imported, capability)."""

    def make(modules: set[str], capability: tuple[int, int] = HOPPER, *, cuda: str = "12.9") -> None:
        def load(name: str) -> object:
            if name not in modules:
                raise ImportError(f"undefined symbol in {name}\nand more lines")
            return object()

        packages = {name.partition(".")[0] for name in modules}
        fake = type("importlib", (), {"import_module": staticmethod(load)})
        fake.util = type("util", (), {"find_spec": staticmethod(lambda name: name if name in packages else None)})
        monkeypatch.setattr(kernels, "importlib", fake)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return make


def resolve(device: torch.device = CUDA, *, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> EncoderKernels:
    encoder = tiny_encoder_config(**{"layer_spec": "auto", **settings})
    return resolve_kernels(encoder, device, dtype, has_gradient_buffers=True)


def test_a_machine_with_everything_uses_everything(machine: Any) -> None:
    machine(ENGINE | FLASH | APEX)
    engine = "transformer_engine"
    assert resolve() == EncoderKernels(engine, engine, engine, "apex", True)
    assert resolve(layer_spec="local") == EncoderKernels("local", "flash", "torch", "apex", True)
    assert resolve(fused_kernels=False) == EncoderKernels(engine, engine, "torch", "torch", False)
    assert resolve(attention_backend="sdpa") == EncoderKernels(engine, "sdpa", engine, "apex", True)
    assert resolve(attention_backend="flash") == EncoderKernels(engine, "flash", engine, "apex", True)
    assert resolve(CPU) == EncoderKernels()  # fused kernels never run on a CPU
    alone = resolve_kernels(tiny_encoder_config(), CUDA, torch.bfloat16, has_gradient_buffers=False)
    assert not alone.fuses_weight_gradients


def test_what_is_missing_is_said(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine(set())
    with caplog.at_level(logging.INFO):
        assert resolve() == EncoderKernels()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert caplog.messages == [
        "encoder.layer_spec = auto uses local layers, because Transformer Engine is not installed; fused norms and "
        "rotation and FP8 are not available",
        "encoder.attention_backend = auto uses torch's scaled_dot_product_attention, because flash-attn is not "
        "installed; each run of neighbouring samples of equal length then takes a kernel of its own, which is slower "
        "for mixed packs",
        "The encoder's kernels: layers local, attention sdpa, rotation torch, norms torch, weight gradients separate",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        resolve(CPU)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]  # on a CPU nothing is lost
    assert "because this run is on the CPU and Transformer Engine needs CUDA" in caplog.messages[0]


def test_a_package_for_another_torch_counts_as_missing(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine({"transformer_engine", "flash_attn.something"})
    with caplog.at_level(logging.INFO):
        assert resolve() == EncoderKernels()
    assert (
        "because Transformer Engine is installed but cannot be loaded (undefined symbol in "
        "transformer_engine.pytorch); fused" in caplog.messages[0]
    )
    assert "flash-attn is installed but cannot be loaded (undefined symbol in flash_attn); each" in caplog.messages[1]


REFUSED = [
    (
        {"attention_backend": "flash"},
        {"device": CPU},
        "encoder.attention_backend = flash, but this run is on the CPU and flash-attn needs CUDA; install the "
        "flash-attn extra on a machine with a CUDA device and train in bf16, or set encoder.attention_backend: auto",
    ),
    (
        {"attention_backend": "flash"},
        {"dtype": torch.float32},
        "encoder.attention_backend = flash, but train.precision is fp32 and flash-attn computes in bf16; ",
    ),
    (
        {"attention_backend": "flash", "hidden_size": 576},
        {},
        "encoder.attention_backend = flash, but the head dim 288 is more than its 256; ",
    ),
    ({"attention_backend": "flash"}, {}, "encoder.attention_backend = flash, but flash-attn is not installed; "),
    (
        {"attention_backend": "flash"},
        {"modules": FLASH, "capability": (7, 5)},
        "encoder.attention_backend = flash, but this device is older than Ampere, the oldest it runs on; ",
    ),
    (
        {"attention_backend": "transformer_engine"},
        {},
        "encoder.attention_backend = transformer_engine needs Transformer Engine layers, and this run uses local "
        "layers; install the gpu extra on a CUDA machine, or set encoder.attention_backend: auto",
    ),
    (
        {"layer_spec": "transformer_engine"},
        {},
        "encoder.layer_spec = transformer_engine, but Transformer Engine is not installed; install the gpu extra on a "
        "machine with a CUDA device, or set encoder.layer_spec: auto to use local layers",
    ),
    (
        {"fp8": "mxfp8"},
        {"modules": ENGINE},
        "encoder.fp8 = mxfp8 runs on Blackwell of compute capability 10, and this device has compute capability 9.0; "
        "use encoder.fp8: delayed or current or blockwise",
    ),
    (
        {"compile": True},
        {},
        "encoder.compile = true, but torch.compile needs Triton, which is not installed; install it, or set "
        "encoder.compile: false",
    ),
]


@pytest.mark.parametrize(("settings", "where", "text"), REFUSED)
def test_asked_for_and_absent_is_an_error(
    machine: Any, settings: dict[str, Any], where: dict[str, Any], text: str
) -> None:
    machine(where.get("modules", set()), where.get("capability", HOPPER))
    with pytest.raises(ConfigError) as error:
        resolve(where.get("device", CUDA), dtype=where.get("dtype", torch.bfloat16), **settings)
    assert str(error.value).startswith(text)


# recipe -> devices (capability, CUDA) that have it, and that do not. Source: Transformer Engine 2.11.
HARDWARE = {
    "delayed": ([((8, 9), (12, 4)), (HOPPER, (12, 1)), (BLACKWELL, (13, 0)), ((12, 0), (12, 8))], [((8, 0), (12, 8))]),
    "current": ([((8, 9), (12, 4)), (HOPPER, (12, 1)), (BLACKWELL, (13, 0))], [((8, 6), (12, 8)), (HOPPER, (12, 0))]),
    "mxfp8": ([(BLACKWELL, (12, 8)), ((10, 3), (13, 0))], [(HOPPER, (13, 0)), ((12, 0), (13, 0))]),
    "blockwise": ([(HOPPER, (12, 9)), (BLACKWELL, (13, 0))], [(HOPPER, (12, 8)), ((8, 9), (13, 0))]),
}


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_hardware_of_fp8_recipes(recipe: str) -> None:
    has_it, has_not = HARDWARE[recipe]
    assert all(fp8_obstacle(recipe, *device) is None for device in has_it)
    for capability, cuda in has_not:
        sentence = fp8_obstacle(recipe, capability, cuda)
        assert sentence and sentence.startswith(f"encoder.fp8 = {recipe} ") and "; " in sentence


def test_sentences_of_fp8_hardware() -> None:
    assert fp8_obstacle("current", (8, 0), (12, 8)) == (
        "encoder.fp8 = current runs on Ada, Hopper and Blackwell, and this device has compute capability 8.0; set "
        "encoder.fp8: off"
    )
    assert fp8_obstacle("blockwise", HOPPER, (12, 8)) == (
        "encoder.fp8 = blockwise needs CUDA 12.9 or newer, and this torch was built with CUDA 12.8; use encoder.fp8: "
        "delayed or current, or install a newer torch"
    )


def test_fp8_needs_transformer_engine(machine: Any) -> None:
    machine(set())
    with pytest.raises(ConfigError, match=r"^encoder\.fp8 = current needs Transformer Engine layers, and this run"):
        resolve(fp8="current")
    machine(ENGINE)
    assert resolve(fp8="current").layers == "transformer_engine"


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_fp8_recipes_reach_megatron_core(topology: ParallelTopology, recipe: str) -> None:
    skipped = {} if recipe == "delayed" else {"fp8_skip_first_layers": 1, "fp8_skip_last_layers": 2}
    encoder = tiny_encoder_config(num_layers=6, fp8=recipe, layer_spec="auto", **skipped)
    config = build_transformer_config(encoder, topology, dtype=torch.bfloat16, kernels=EncoderKernels())
    assert (config.fp8, config.fp8_recipe) == {
        "delayed": ("hybrid", Fp8Recipe.delayed),
        "current": ("hybrid", Fp8Recipe.tensorwise),
        "mxfp8": ("e4m3", Fp8Recipe.mxfp8),
        "blockwise": ("e4m3", Fp8Recipe.blockwise),
    }[recipe]
    in_bf16 = [layer for layer in range(6) if is_first_last_bf16_layer(config, layer)]
    assert in_bf16 == ([0, 4, 5] if skipped else [])
    assert not config.fp8_param and not config.fp8_dot_product_attention  # weights and attention stay in bf16


def test_only_skipped_ends_are_skipped() -> None:
    """megatron-core's own default is one layer at each end as soon as its switch is on."""
    fields = fp8_fields(tiny_encoder_config(layer_spec="auto", fp8="current", fp8_skip_last_layers=1))
    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=2, **fields)
    assert [layer for layer in range(4) if is_first_last_bf16_layer(config, layer)] == [3]
    assert fp8_fields(tiny_encoder_config(fp8_skip_last_layers=1)) == {}


def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError) as error:
        resolve(CPU, compile=True)
    assert str(error.value) == (
        "encoder.compile = true, but torch.compile needs a C++ compiler on a CPU, and none of c++, g++, clang++ is on "
        "the PATH; install it, or set encoder.compile: false"
    )
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name if name == "clang++" else None)
    assert resolve(CPU, compile=True).rotation == "compiled"


def test_real_imports_are_tried() -> None:
    """The fake machine stands for importlib; this is the real one."""
    assert kernels._import_problem("json", "JSON", "json.decoder") is None
    assert kernels._import_problem("no_such_package", "It", "no_such_package") == "It is not installed"
    problem = kernels._import_problem("json", "JSON", "json.no_such_module")
    assert problem and problem.startswith("JSON is installed but cannot be loaded (No module named 'json.no_such")
    assert importlib is kernels.importlib
