"""The GPU verification kit, on a CPU with toy sizes: the benchmark's code, its figures, the wheels, the yardstick."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ove.model import rotary
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.planning.plan import model_operations
from tests.support.encoder_parity import PLAIN, compare, run_encoder
from tests.support.tool_scripts import run_script

sys.path.append(str(Path(__file__).parents[2] / "tools/gpu"))

from bench_gpu import markdown
from gpu_measure import data_sheet_of_name
from gpu_workloads import LearnableSamples, Pack, bench_config, packs, workload_of_pack

INSTALL = Path(__file__).parents[2] / "tools/gpu/install_wheels.sh"


def run_benchmark(output: Path, *options: str) -> dict[str, Any]:
    assert run_script("gpu/bench_gpu.py", "--device", "cpu", "--tiny", "--output", output, *options) == 0
    written = json.loads(output.with_suffix(".json").read_text())
    assert markdown(written) == output.with_suffix(".md").read_text()
    return written


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every part of the benchmark, a minute: for tests marked `full`."""
    return run_benchmark(tmp_path_factory.mktemp("bench") / "tiny")


def test_the_quickest_parts_run(tmp_path: Path) -> None:
    result = run_benchmark(tmp_path / "tiny", "--sections", "crossover", "decode")
    assert list(result["sections"]) == ["crossover", "decode"]
    assert all(section["rows"] for section in result["sections"].values())


@pytest.mark.full
def test_every_part_runs_or_says_why_not(result: dict[str, Any]) -> None:
    sections = result["sections"]
    assert list(sections) == ["speed", "loss", "crossover", "decode", "heads"]
    assert all(section["rows"] for section in sections.values())
    speed = [(row["pack"], row["variant"]) for row in sections["speed"]["rows"]]
    assert [pack for pack, variant in speed if variant == "bf16"] == ["224 px", "448 px", "packed clips"]
    assert {variant for _, variant in speed} >= {"local layers, sdpa", "selective recompute", "full recompute"}
    assert all(row["step_ms"] > 0 and row["mfu"] is None for row in sections["speed"]["rows"])
    reasons = {what: why for name in ("speed", "loss", "crossover") for what, why in sections[name]["skipped"]}
    assert reasons["fp8 current"].startswith("encoder.fp8 = current needs Transformer Engine layers")
    assert reasons["base, packed clips, local layers, flash"].startswith("encoder.attention_backend = flash, but")
    assert reasons["MFU"].startswith("no data-sheet rate is known")
    assert sections["decode"]["rows"][0]["pictures_per_s"] > 0 and sections["decode"]["skipped"][0][0] == "GPU"


@pytest.mark.full
def test_losses_are_learned_and_compared(result: dict[str, Any]) -> None:
    bf16, fp32 = result["sections"]["loss"]["rows"]
    assert (bf16["variant"], fp32["variant"]) == ("bf16", "fp32")
    assert bf16["last_loss"] < 0.97 * bf16["first_loss"]
    assert bf16["difference_to_bf16"] == 0 and 0 < abs(fp32["difference_to_bf16"]) < 0.01
    assert LearnableSamples(num_classes=4, batch_size=3, patches_per_sample=2, patch_size=14)(7)[1].tolist() == (
        LearnableSamples(num_classes=4, batch_size=3, patches_per_sample=2, patch_size=14)(7)[1].tolist()
    )


@pytest.mark.full
def test_tables_of_every_part(result: dict[str, Any]) -> None:
    text = markdown(result)
    assert "Toy sizes: these figures say only that the code runs." in text
    assert "| variant | first loss | last loss | difference to bf16 |" in text and "| 0.00 % |" in text
    assert text.count("\n- fp8 delayed; fp8 current, first") == 0  # one reason a line, not one of several


def test_a_table() -> None:
    row = {"size": "large", "mfu": 0.5123, "step_ms": 12345.6, "peak_gib": None}
    section = {"title": "T", "note": "", "rows": [row], "skipped": []}
    machine = {"device": "x", "packages": {"torch": "1"}}
    one = markdown({"machine": machine, "effort": {"tiny": False}, "sections": {"speed": section}})
    assert "| large | 51.23 % | 12,346 | - |" in one


def test_packs_fill_their_budget_and_operations_are_counted() -> None:
    for pack in packs(tiny=False):
        assert sum(pack.lengths) <= pack.num_tokens == 16384 and sum(pack.lengths) > 0.99 * pack.num_tokens
    encoder = {"hidden_size": 64, "num_layers": 3, "num_attention_heads": 2, "ffn_hidden_size": 256, "patch_size": 4}
    pack = Pack("p", (30, 50), 96)
    found = model_operations(bench_config(encoder, num_tokens=96), workload_of_pack(pack))
    assert found["linear layers"] == 6 * 80 * 3 * (4 * 64 * 64 + 2 * 64 * 256)  # 2 a product, 3 products a pass
    assert found["attention"] == 3 * 4 * (30**2 + 50**2) * 64 * 3


def test_data_sheets_by_name() -> None:
    names = {"NVIDIA H200": "h200-141g", "NVIDIA H100 80GB HBM3": "h100-80g", "NVIDIA A100-SXM4-80GB": "a100-80g"}
    for name, wanted in {**names, "NVIDIA B200": "b200"}.items():
        sheet = data_sheet_of_name(name)
        assert sheet and sheet.name == wanted
    assert all(data_sheet_of_name(name) is None for name in ("NVIDIA H100 PCIe", "NVIDIA L40S", "NVIDIA GB200"))


def test_yardstick_tells_a_wrong_kernel(topology: ParallelTopology, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of the GPU tests, on the CPU: the right encoder is within it, one with a wrong rotation is not."""
    exact = run_encoder(topology, torch.float32, **PLAIN)
    bf16 = compare(run_encoder(topology, torch.bfloat16, **PLAIN), exact)
    assert 0 < bf16.pooled < 0.05
    compiled = compare(run_encoder(topology, torch.bfloat16, **{**PLAIN, "recompute": "full"}), exact)
    assert compiled.within(bf16, 2.0)
    monkeypatch.setattr(rotary, "_AXIS_SHARES", (6, 4, 6))
    wrong = compare(run_encoder(topology, torch.bfloat16, **PLAIN), exact)
    assert not wrong.within(bf16, 2.0)


def make_wheel(folder: Path, name: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"VALUE = '{name}'\n" + "# " + "x" * 5000 + "\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def install(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(INSTALL), str(folder), str(site)]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_wheels_in_parts(tmp_path: Path) -> None:
    folder, site = tmp_path / "wheels of mine", tmp_path / "site"
    folder.mkdir()
    make_wheel(folder, "first_of_two")
    split = make_wheel(folder, "second_of_two")
    content = split.read_bytes()
    split.unlink()
    third = len(content) // 3
    pieces = [content[:third], content[third : 2 * third], content[2 * third :]]
    for index in (0, 2):
        (folder / f"{split.name}.part-{index:02d}").write_bytes(pieces[index])
    missing = install(folder, site)
    assert missing.returncode == 2 and not site.exists()
    assert missing.stderr.strip() == (
        f"{folder}/{split.name}.part-01 is missing, so {split.name} cannot be joined; copy all its parts into {folder}"
    )
    (folder / f"{split.name}.part-02").unlink()
    (folder / f"{split.name}.part-01").write_bytes(pieces[1])
    short = install(folder, site)
    assert short.returncode == 2 and "do not make a whole wheel" in short.stderr and not site.exists()
    (folder / f"{split.name}.part-02").write_bytes(pieces[2])
    assert install(folder, site).stdout == f"Installed 2 wheels into {site}\n"
    code = "import first_of_two, second_of_two; print(first_of_two.VALUE, second_of_two.VALUE)"
    ran = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert ran.stdout.split() == ["first_of_two", "second_of_two"]


def test_no_wheels(tmp_path: Path) -> None:
    assert "holds no wheel" in install(tmp_path, tmp_path / "site").stderr
    assert "is not a folder" in install(tmp_path / "nothing", tmp_path / "site").stderr
