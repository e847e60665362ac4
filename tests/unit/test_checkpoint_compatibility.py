"""Differences between a checkpoint's configuration and the present one: refused, warned about, or accepted."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from megatron_ove.checkpoint.compatibility import check_fits, exactness_warnings, size_warnings
from megatron_ove.errors import CheckpointError

PATH = Path("runs/x/checkpoints/step_00000100")
CONFIG = {
    "seed": 1,
    "encoder": {
        "kind": "onevision",
        "hidden_size": 64,
        "num_layers": 4,
        "num_attention_heads": 2,
        "ffn_hidden_size": 128,
        "patch_size": 14,
        "layer_norm_epsilon": 1e-6,
        "rope_theta": 1e4,
        "rope_temporal_size": 64,
        "use_head": True,
        "recompute": "none",
    },
    "objectives": {"pages": {"kind": "partial_fc", "num_classes": 20, "margin": 0.3, "sample_rate": 0.1}},
    "parallel": {"use_distributed_optimizer": False, "tensor_model_parallel_size": 2},
    "train": {"precision": "fp32", "global_batch_size": 8, "num_steps": 10},
    "data": {"tokens_per_microbatch": 128, "sources": {"a": {"weight": 1.0, "path": "x"}}},
}


def changed(path: str, value) -> dict:
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split(".")
    node = config
    for key in parents:
        node = node[key]
    node[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("encoder.hidden_size", 128, "encoder.hidden_size is 64 there and 128 here"),
        ("encoder.rope_theta", 1e5, "encoder.rope_theta is 10000.0 there and 100000.0 here"),
        ("objectives.pages.num_classes", 30, "objectives.pages.num_classes is 20 there and 30 here"),
        ("objectives", {}, "objectives.pages is in the checkpoint but not here"),
        ("objectives.more", {"num_classes": 3}, "objectives.more is not in the checkpoint"),
    ],
)
def test_another_model_is_refused_with_the_differing_field(path, value, text):
    advice = "or use another run_dir to train a new model"
    if path.startswith("objectives"):
        advice = (
            "or, to go on with its encoder and fresh class centers in a new run, write another run_dir and the line "
        )
        advice = f"{advice}'init_from: {PATH}'"
    with pytest.raises(CheckpointError) as caught:
        check_fits(PATH, CONFIG, changed(path, value))
    separator = ";" if path.startswith("objectives") else ","
    assert str(caught.value) == (
        f"the checkpoint {PATH} holds another model: {text}; set the fields as they are in the checkpoint{separator} "
        f"{advice}"
    )


def test_another_head_on_another_encoder_does_not_promise_that_the_encoder_can_be_kept():
    current = changed("objectives.more", {"num_classes": 3})
    current["encoder"]["patch_size"] = 16
    with pytest.raises(CheckpointError, match=r"objectives.more is not in the checkpoint") as caught:
        check_fits(PATH, CONFIG, current)
    assert "init_from" not in str(caught.value)


def test_a_renamed_head_is_refused_with_both_names():
    current = changed("objectives", {"words": CONFIG["objectives"]["pages"]})
    with pytest.raises(
        CheckpointError, match=r"objectives.pages is in the checkpoint but not here; objectives.words is"
    ):
        check_fits(PATH, CONFIG, current)


def test_all_differences_are_named_at_once():
    current = changed("encoder.num_layers", 6)
    current["encoder"]["patch_size"] = 16
    with pytest.raises(CheckpointError, match=r"num_layers is 4 there and 6 here; encoder.patch_size is 14 there and"):
        check_fits(PATH, CONFIG, current)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("parallel.use_distributed_optimizer", True, "saved with parallel.use_distributed_optimizer = False and this"),
        ("train.precision", "bf16", "was saved with train.precision = fp32 and this run has bf16"),
    ],
)
def test_another_optimizer_format_is_refused(path, value, text):
    with pytest.raises(CheckpointError, match=re.escape(text)):
        check_fits(PATH, CONFIG, changed(path, value))


@pytest.mark.parametrize("path", ["parallel.tensor_model_parallel_size", "train.num_steps", "objectives.pages.margin"])
def test_what_may_change_is_accepted_in_silence(path):
    check_fits(PATH, CONFIG, changed(path, 1))
    assert exactness_warnings(CONFIG, changed(path, 1)) == []


@pytest.mark.parametrize(
    ("path", "value", "start"),
    [
        ("seed", 2, "seed was 1 when the checkpoint was saved and is 2 now"),
        ("train.global_batch_size", 16, "train.global_batch_size was 8 when"),
        ("data.sources.a.weight", 2.0, "data.sources.a.weight was 1.0 when the checkpoint was saved and is 2.0 now"),
        (
            "objectives.pages.sample_rate",
            0.2,
            "objectives.pages.sample_rate was 0.1 when the checkpoint was saved and is",
        ),
        ("data.sources.b", {"path": "y"}, "data.sources.b was absent when the checkpoint was saved and is {'path': "),
    ],
)
def test_what_ends_exactness_is_warned_about(path, value, start):
    (sentence,) = exactness_warnings(CONFIG, changed(path, value))
    assert sentence.startswith(start)
    assert sentence.endswith("set it back if you need the same result")


def test_another_number_of_samples_is_warned_about():
    (sentence,) = size_warnings({"a": 10, "b": 3}, {"a": 12, "b": 3, "new": 5})
    assert sentence.startswith(
        "data.sources.a had 10 samples when the checkpoint was saved and has 12 now, so from here on"
    )
    assert size_warnings({}, {"a": 12}) == []
