"""The benchmark of a joint step: both sides embed the same samples to the same features, and the command runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_ove.model.encoder import build_encoder
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.step_timers import StepTimers
from tests.support.tiny import tiny_encoder_config
from tests.support.tool_scripts import run_script

sys.path.append(str(Path(__file__).parents[2] / "tools/benchmark"))

from encoder_contenders import plain_encoder
from plain_vit import normalize_pixels
from published_head import PublishedHead
from published_loop import PublishedLoop
from train_step_contenders import pack
from train_step_work import GRID_FRAMES, SOURCES, Workload

PATCH = 4
WORK = Workload(
    samples={"image": 2, "ocr": 1, "video": 4},
    classes=dict.fromkeys(SOURCES, 50),
    picture_side=3 * PATCH,
    frame_side=2 * PATCH,
    kept_frames=4,
)
TINY = ("--layers", 1, "--picture-side", 28, "--frame-side", 28, "--kept-frames", 2, "--threads", 1, "--repeats", 2)
CLASSES = ("--image-classes", 300, "--ocr-classes", 200, "--video-classes", 100)


def test_samples_are_of_the_three_published_kinds() -> None:
    samples = WORK.draw(0, PATCH)
    per_frame, kept = 2 * 2, 4 * 2 * 2
    assert samples.visible.shape == (3, kept) and samples.collage_frames.shape == (1, 4)
    codec, sampled = samples.visible[:2], samples.visible[2]
    for row in samples.visible:
        assert len(row.unique()) == kept and row.min() >= 0 and row.max() < GRID_FRAMES * per_frame
        assert torch.equal(row.sort().values, row)
    frames = sampled.view(4, per_frame) // per_frame
    assert torch.equal(frames, frames[:, :1].expand(-1, per_frame))
    for drawn in (frames[:, 0], samples.collage_frames[0]):
        assert torch.equal(drawn // 16, torch.arange(4))  # one frame of each of 4 equal parts
    assert len((codec // per_frame).unique()) > 4  # patches of many frames
    assert torch.equal(WORK.draw(0, PATCH).visible, samples.visible)
    assert not torch.equal(WORK.draw(1, PATCH).visible, samples.visible)


def test_both_embed_every_kind_of_sample_alike(topology: ParallelTopology) -> None:
    """Four dense forwards against one pack: features, and gradients of the pooling head and the patch embedding."""
    ours = build_encoder(tiny_encoder_config(), topology, dtype=torch.float32, seed=1)
    plain = plain_encoder(ours, "eager")
    samples = WORK.draw(0, PATCH)
    loop = PublishedLoop(plain, {}, lr=0.1, autocast=False, timers=StepTimers(topology.device))
    embeddings = loop.embed({name: normalize_pixels(value) for name, value in samples.pixels.items()}, samples)
    expected = torch.cat([embeddings[name] for name in SOURCES])
    pooled = ours(pack(samples, PATCH).main).pooled
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
    assert (expected[3:5] - expected[5:7]).abs().max() > 1e-2  # clips do differ
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (pooled * weights).sum().backward()
    for name, parameter in plain.head.named_parameters():
        torch.testing.assert_close(ours.head.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4)
    conv = plain.embeddings["patch_embedding"].weight.grad
    torch.testing.assert_close(ours.patch_embed.weight.grad, conv.flatten(1), rtol=1e-3, atol=1e-4)


def test_published_step_trains_encoder_and_heads(topology: ParallelTopology) -> None:
    ours = build_encoder(tiny_encoder_config(), topology, dtype=torch.float32, seed=1)
    plain = plain_encoder(ours, "eager")
    torch.manual_seed(0)
    heads = {name: PublishedHead(50, 64, num_slots=8, sample_rate=1.0, lr=1e-3) for name in SOURCES}
    loop = PublishedLoop(plain, heads, lr=1e-3, autocast=False, timers=StepTimers(topology.device))
    samples = WORK.draw(0, PATCH)
    pixels = {name: normalize_pixels(value) for name, value in samples.pixels.items()}
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    tables = [head.weight.detach().clone() for head in heads.values()]
    losses = [float(loop.step(pixels, samples)) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert all(not torch.equal(head.weight, table) for head, table in zip(heads.values(), tables, strict=True))


@pytest.mark.full
def test_command_compares_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    arguments = (*TINY, *CLASSES, "--head", "sample_rate=0.1", "--json", path)
    assert run_script("benchmark/train_step.py", *arguments) == 0
    document = json.loads(path.read_text())
    ours, published = document["contenders"]["ours"], document["contenders"]["published"]
    assert document["ratio_time_vs_published"] == published["seconds"] / ours["seconds"]
    for figures in (ours, published):
        assert len(figures["all_seconds"]) == 2 and figures["peak_memory_bytes"] > 0
        for part in ("forward", "backward", "head", "optimizer"):
            assert figures["parts"][part] > 0
        assert sum(figures["parts"].values()) < 1.5 * figures["seconds_most"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(("--kept-frames", 5), "does not divide the 64 frames"), (("--head", "rate"), "has no '='")],
)
def test_senseless_options_get_a_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script("benchmark/train_step.py", *TINY, *arguments) == 2
    assert sentence in capsys.readouterr().err
