"""The benchmark of the encoder: plain yardsticks that compute what ours does, parts of a step, a command that runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_ove.model.encoder import build_encoder
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.reference_encoder import ReferenceEncoder
from tests.support.tiny import codec_clip_sample, random_patches, tiny_encoder_config
from tests.support.tool_scripts import run_script

sys.path.append(str(Path(__file__).parents[2] / "tools/benchmark"))

import encoder_contenders
import encoder_parts
import turns
from encoder_contenders import OurEncoder, PlainEncoder, Workload, plain_encoder
from plain_vit import normalize_pixels

TINY = ("--size", "base", "--layers", 1, "--resolution", 28, "--threads", 1, "--repeats", 2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_plain_encoder_is_the_reference(topology: ParallelTopology, attention: encoder_contenders.Attention) -> None:
    config = tiny_encoder_config()
    ours = build_encoder(config, topology, dtype=torch.float32, seed=4)
    plain = plain_encoder(ours, attention)
    reference = ReferenceEncoder(config)
    reference.load_state_dict(plain.state_dict())
    patches, positions = random_patches(2 * 6, seed=1), codec_clip_sample(6, 4, 3)[1]
    # Two clips of two frames of 1 x 3 patches, at scattered positions: frames are folded, positions are as given.
    pixels = patches.view(2, 2, 3, 3, 4, 4).permute(0, 1, 3, 4, 2, 5).reshape(2, 2, 3, 4, 12)
    pooled = plain(normalize_pixels(pixels), positions.expand(2, -1, -1))
    expected = reference.encode([(patches[:6], positions), (patches[6:], positions)])
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


def test_contenders_agree_in_outputs_and_gradients(topology: ParallelTopology) -> None:
    work = Workload(size="base", num_layers=1, resolution=42, batch_size=2)
    ours, eager, sdpa = (
        contender.outputs()
        for contender in (
            OurEncoder(work, topology),
            PlainEncoder(work, "eager", topology),
            PlainEncoder(work, "sdpa", topology),
        )
    )
    assert ours.keys() == eager.keys() == sdpa.keys() and len(ours) > 20
    for name, expected in eager.items():
        scale = expected.abs().max()
        assert scale > 0, name
        for actual in (ours[name], sdpa[name]):
            assert (actual - expected).abs().max() < 1e-3 * scale, name


class _Multiplies:
    """A contender that does nothing but a product and a GELU."""

    def __init__(self) -> None:
        self._x = torch.randn(256, 256, requires_grad=True)

    def outputs(self) -> dict[str, torch.Tensor]:
        return {}

    def prepare(self) -> None:
        pass

    def step(self) -> dict[str, float]:
        torch.nn.functional.gelu(self._x @ self._x).sum().backward()
        return {}


def test_parts_are_told_apart() -> None:
    parts = encoder_parts.measure_parts(_Multiplies())
    assert parts["linear maps"] > 0 and parts["GELU"] > 0
    assert parts["rotary"] == parts["attention"] == 0
    assert all(seconds >= 0 for seconds in parts.values())


def test_a_contender_is_timed_in_a_process_of_its_own() -> None:
    compared = []
    figures = turns.take_turns(
        {"it": (_Multiplies, ())}, turns.Schedule(threads=1, rounds=2), compared.append, encoder_parts.measure_parts
    )["it"]
    assert compared == [{"it": {}}]
    assert len(figures.seconds) == 2 and figures.peak_bytes > 0
    assert figures.parts["linear maps"][0] > 0


@pytest.mark.full
def test_command_compares_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "encoder.json"
    assert run_script("benchmark/encoder.py", *TINY, "--parts", "--json", path) == 0
    document = json.loads(path.read_text())
    assert set(document["contenders"]) == {"ours", "eager", "sdpa"}
    for figures in document["contenders"].values():
        assert len(figures["all_seconds"]) == 2 and figures["peak_memory_bytes"] > 0
    ours, eager = document["contenders"]["ours"], document["contenders"]["eager"]
    assert document["times_faster_than"]["eager"] == eager["seconds"] / ours["seconds"]
    for name in ("ours", "sdpa"):
        figures = document["contenders"][name]
        assert all(figures["parts"][part] > 0 for part in ("embedding", "attention", "norms", "rotary", "linear maps"))


def test_encoders_that_disagree_are_not_timed() -> None:
    sys.modules.pop("encoder", None)
    import encoder

    same = {"pooled": torch.ones(2)}
    encoder._check_agreement({"ours": same, "eager": same, "sdpa": same}, 1e-3)
    with pytest.raises(RuntimeError, match="ours and sdpa differ in pooled"):
        encoder._check_agreement({"ours": same, "eager": same, "sdpa": {"pooled": torch.ones(2) * 1.1}}, 1e-3)
