"""The loss of a head that knows nothing, and the sentence about runs that stay above it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.objectives.chance import chance_loss, margin_softmax_of
from megatron_ove.training.chance_watch import ChanceWatch
from tests.support.tiny_run import check, tiny_config


def head(**options: Any) -> PartialFCConfig:
    values = {"kind": "partial_fc", "source": "pages", "num_classes": 300, "sample_rate": 1.0, "labels_per_step": 1}
    return PartialFCConfig(**{**values, **options})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"logit_scale": 24.0, "margin": 0.1}, math.log(1 + 299 * math.exp(2.4))),  # reading.md: 8.10
        ({"logit_scale": 16.0, "margin": 0.0}, math.log(300)),  # reading.md: 5.704
        ({"logit_scale": 24.0, "margin_type": "arcface", "margin": 0.5}, math.log(299) + 24 * math.sin(0.5)),
        ({"sample_rate": 0.1, "sampling_correction": "logq", "margin": 0.0}, math.log(300)),
        ({"sample_rate": 0.1, "margin": 0.0}, math.log(30 + 270 * (1 - (1 - 1 / 300) ** 16))),
    ],
)
def test_chance_is_the_loss_at_cosines_of_zero(options: dict[str, Any], expected: float) -> None:
    assert chance_loss(head(**options), num_samples=16) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("margin_type", ["cosface", "arcface", "combined"])
def test_the_head_itself_has_this_loss(margin_type: str) -> None:
    combined = (1.1, 0.2, 0.1) if margin_type == "combined" else None
    config = head(margin_type=margin_type, margin=0.3, combined_margin=combined, logit_scale=20.0)
    negatives, cosine = torch.full((4, 1), math.log(299.0)), torch.zeros(4, 1)
    losses = margin_softmax_of(config).sample_losses(negatives, cosine, torch.zeros(4, 1, dtype=torch.int64), None)
    assert losses.numpy() == pytest.approx(chance_loss(config, 4), abs=1e-4)


def run_config(tmp_path: Path, *, warmup: int = 100, lr_multiplier: float = 1.0) -> TrainConfig:
    sources = {kind: str(tmp_path / kind) for kind in ("image", "ocr", "video")}
    data = tiny_config(sources, tmp_path, train={"num_steps": 5000})
    data["objectives"]["ocr_labels"] |= {"num_classes": 300, "logit_scale": 24.0, "margin": 0.1, "labels_per_step": 1}
    data["optim"] = {"schedule": {"warmup_steps": warmup}, "class_centers": {"lr_multiplier": lr_multiplier}}
    return check(data)


def watch(config: TrainConfig, loss: Callable[[int], float], steps: Sequence[int]) -> dict[int, list[str]]:
    """Returns step -> sentences."""
    watcher = ChanceWatch(config)
    said = {step: watcher.observe({"step": step, "loss/ocr_labels": loss(step), "loss": 1.0}) for step in steps}
    return {step: sentences for step, sentences in said.items() if sentences}


def curve(steps: Sequence[int], losses: Sequence[float]) -> Callable[[int], float]:
    return lambda step: float(np.interp(step, steps, losses))


# Measured on strips with a word of 300 each, scale 24, margin 0.1: chance is 8.10.
TOO_FAST = curve([1, 25, 50, 100, 150, 200, 250, 300], [9.2, 8.86, 8.54, 9.47, 10.01, 9.56, 9.21, 9.08])
SLOWER = curve([1, 25, 50, 100, 150, 200, 250, 300], [9.4, 9.09, 8.33, 8.241, 8.238, 8.230, 8.229, 8.222])


def test_centers_that_move_too_fast_are_spoken_of_once(tmp_path: Path) -> None:
    said = watch(run_config(tmp_path), TOO_FAST, range(1, 400))
    ((step, (sentence,)),) = said.items()
    assert step <= 210
    assert sentence.startswith("The loss of objectives.ocr_labels was 9.")
    assert "where a head that knows nothing has 8.10, and does not fall fast enough" in sentence
    assert "set optim.class_centers.lr_multiplier to about 0.1 (now 1)" in sentence


def test_a_loss_near_chance_or_on_its_way_below_it_is_left_alone(tmp_path: Path) -> None:
    assert not watch(run_config(tmp_path), SLOWER, range(1, 400))
    assert not watch(run_config(tmp_path), lambda step: 14.0 - step / 40, range(1, 300))
    assert watch(run_config(tmp_path), lambda step: 14.0 - step / 400, range(1, 300))


def test_the_warm_up_does_not_count_and_reports_without_samples_are_passed_over(tmp_path: Path) -> None:
    config = run_config(tmp_path, warmup=1000)
    said = watch(config, lambda step: 9.0, range(10, 5000, 10))
    assert list(said) == [2000]  # 100 reports behind step 1000, and as many before
    watcher = ChanceWatch(config)
    assert not any(watcher.observe({"step": step, "loss": 9.0}) for step in range(1, 3000))
