"""Windows of the profiler: what is refused, what is warned about, and how memory is given to phases."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ove.cli.main import main
from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.profile import ProfileConfig
from megatron_ove.errors import ConfigError
from megatron_ove.planning.devices import device_of_torch
from megatron_ove.training.profiling import StepProfiler, peaks_by_phase
from tests.support.tiny_run import NUM_CLASSES, tiny_config

MIB = 2**20


def profiler(folder: Path, rank: int = 0, **window: Any) -> StepProfiler:
    topology: Any = SimpleNamespace(world_size=4, global_rank=rank, device=torch.device("cpu"))
    return StepProfiler(ProfileConfig(**window), topology, folder)


def run_steps(one: StepProfiler, first: int, last: int) -> None:
    with one.run_from(first):
        for step in range(first, last + 1):
            one.before_step(step)
            torch.ones(8).sum()
            one.after_step(step)


def written(folder: Path) -> set[str]:
    return {path.name.split("_")[1].split(".")[0] for path in folder.glob("*")}


def test_a_rank_that_does_not_exist_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile\.ranks names rank 4, but the ranks of this run are 0 to 3;"):
        profiler(tmp_path, ranks=(0, 4))


def test_only_the_ranks_asked_for_record_and_without_a_window_none(tmp_path: Path) -> None:
    run_steps(profiler(tmp_path / "others", rank=2, start_step=1, num_steps=1), 1, 2)
    run_steps(profiler(tmp_path / "none"), 1, 2)
    assert not list(tmp_path.iterdir())


def test_a_window_that_the_run_does_not_finish_is_written_as_far_as_it_got(tmp_path: Path) -> None:
    run_steps(profiler(tmp_path, start_step=3, num_steps=10), 1, 4)
    assert written(tmp_path) == {"steps3-4"}


def test_a_resumed_run_says_what_of_the_window_is_past(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="megatron_ove"):
        run_steps(profiler(tmp_path / "past", start_step=2, num_steps=3), 5, 6)
        run_steps(profiler(tmp_path / "half", start_step=2, num_steps=4), 5, 6)
        run_steps(profiler(tmp_path / "other_rank", rank=1, start_step=2, num_steps=4), 5, 6)
        run_steps(profiler(tmp_path / "next", start_step=5, num_steps=1), 5, 6)
    assert [record.getMessage() for record in caplog.records] == [
        "Steps 2 to 4 are to be profiled, but this run continues with step 5, so nothing will be; give --profile a "
        "start that is still to come",
        "Steps 2 to 5 are to be profiled, but this run continues with step 5, so only from step 5 on will be; give "
        "--profile a start that is still to come",
    ]
    assert not (tmp_path / "past").exists()
    assert written(tmp_path / "half") == written(tmp_path / "next") == {"steps5-5"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"profile": {"start_step": 21}},
            "profile.start_step = 21 with profile.num_steps = 3 asks for steps up to 23, ",
        ),
        ({"profile": {"start_step": 19}}, "but train.num_steps = 20 is the last one; start earlier or profile fewer"),
        ({"profile": {"start_step": 0}}, "profile.start_step = 0 is not allowed: it should be greater than 0"),
        ({"profile": {"num_steps": 0}}, "profile.num_steps = 0 is not allowed: it should be greater than 0"),
        ({"profile": {"ranks": ()}}, "profile.ranks"),
        (
            {"profile": {"ranks": (0, -1)}},
            "profile.ranks.1 = -1 is not allowed: it should be greater than or equal to 0",
        ),
        (
            {"encoder": {"fp8": "current"}, "train": {"precision": "fp32"}},
            "encoder.fp8 = current with train.precision = fp32: FP8 layers take and give bf16",
        ),
        (
            {"optim": {"schedule": {"warmup_steps": 20}}},
            "optim.schedule.warmup_steps = 20 is not below train.num_steps = 20, so the rate would never",
        ),
    ],
)
def test_wrong_windows_and_warm_ups_get_their_sentence(sections: dict[str, Any], message: str) -> None:
    data = tiny_config({kind: kind for kind in NUM_CLASSES}, "runs/test", **sections)
    with pytest.raises(ConfigError) as caught:
        config_from_dict(data, "run.yaml")
    assert message in str(caught.value)


def test_the_last_steps_can_be_profiled() -> None:
    data = tiny_config({kind: kind for kind in NUM_CLASSES}, "runs/test", profile={"start_step": 18})
    assert config_from_dict(data, "run.yaml").profile.start_step == 18


@pytest.mark.parametrize("window", ["5", "5:0", "0:3", "-1:3", "5:-2", "a:b", "1:2:3", "1.5:2"])
def test_a_window_of_another_form_is_a_sentence(window: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.yaml", f"--profile={window}"]) == 2
    text = capsys.readouterr().err
    assert f"--profile {window} is not of the form START:COUNT with two whole numbers of at least 1" in text


def test_memory_belongs_to_the_innermost_phase() -> None:
    moments = [
        (0, 1, "", 1 * MIB),
        (1, 0, "forward", 1),
        (2, 1, "", 4 * MIB),
        (3, 0, "head", 1),
        (4, 1, "", 2 * MIB),
        (5, 1, "", -2 * MIB),
        (6, 2, "head", -1),
        (7, 1, "", -4 * MIB),
        (8, 2, "forward", -1),
    ]
    assert peaks_by_phase(moments) == {
        "outside": {"peak_held_mib": 1.0, "allocated_mib": 1.0},
        "forward": {"peak_held_mib": 5.0, "allocated_mib": 4.0},
        "head": {"peak_held_mib": 7.0, "allocated_mib": 2.0},
    }


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H200", "h200-141g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),  # slower than the form whose figures we have
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_are_known_by_torchs_names(name: str, known: str | None) -> None:
    device = device_of_torch(name)
    assert (device.name if device else None) == known
