"""Configuration: precedence, YAML traps, and the text of every error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ove.config.error_report import field_paths
from megatron_ove.config.loader import config_from_dict, dump_config, load_config
from megatron_ove.config.yaml_file import parse_yaml
from megatron_ove.errors import ConfigError
from megatron_ove.kinds import load_kinds

GOLDEN = Path(__file__).parents[1] / "golden" / "config_fields.txt"


def valid_config() -> dict[str, Any]:
    return {
        "name": "test",
        "run_dir": "runs/test",
        "encoder": {"hidden_size": 64, "num_layers": 4, "num_attention_heads": 2, "ffn_hidden_size": 128},
        "objectives": {"clusters": {"kind": "partial_fc", "source": "images", "num_classes": 100}},
        "data": {"sources": {"images": {"kind": "image", "path": "data/images"}}},
        "train": {"num_steps": 10, "global_batch_size": 8},
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    data = valid_config()
    node: Any = data
    *parents, last = path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return data


def write(folder: Path, name: str, data: Any) -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def test_defaults_extends_file_and_set_win_in_this_order(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", {"optim": {"lr": 0.5, "weight_decay": 0.5}, "seed": 1})
    write(tmp_path, "later.yaml", {"optim": {"weight_decay": 0.25, "beta1": 0.25}})
    path = write(tmp_path, "run.yaml", {**valid_config(), "extends": ["base.yaml", "later.yaml"], "seed": 3})
    config = load_config(path, ["optim.beta1=0.125", "data.sources.images.image_size=28"])
    assert (config.optim.lr, config.optim.weight_decay, config.optim.beta1) == (0.5, 0.25, 0.125)
    assert config.optim.beta2 == 0.999
    assert config.seed == 3
    assert config.data.sources["images"].image_size == 28


def test_dump_reloads_to_an_equal_config(tmp_path: Path) -> None:
    config = config_from_dict(valid_config(), "test")
    assert load_config(write(tmp_path, "dumped.yaml", dump_config(config))) == config


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", ".001", "+1e-3", "1.0e-3"])
def test_scientific_notation_is_a_number(text: str) -> None:
    assert parse_yaml(f"lr: {text}", "test")["lr"] == pytest.approx(1e-3)


def test_scientific_notation_reaches_the_configuration_from_file_and_command_line(tmp_path: Path) -> None:
    text = yaml.safe_dump(valid_config()) + "optim: {lr: 1e-3, weight_decay: 0.5}\n"
    path = write(tmp_path, "run.yaml", text)
    assert load_config(path).optim.lr == 0.001
    assert load_config(path, ["optim.weight_decay=5e-2"]).optim.weight_decay == 0.05


@pytest.mark.parametrize("text", ["1e", "e3", "v1e-3", "1.2.3", "-", "2026-01-01x"])
def test_texts_stay_texts(text: str) -> None:
    assert isinstance(parse_yaml(f"{{a: '{text}'}}", "test")["a"], str)
    assert parse_yaml(f"a: {text}x", "test")["a"] == f"{text}x"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.learning_rate", 1, "unknown key 'optim.learning_rate'; known here: beta1, beta2, class_centers"),
        ("optim.weight_decy", 1, "unknown key 'optim.weight_decy'; did you mean 'weight_decay'?"),
        ("objectives.clusters.margn", 0.1, "unknown key 'objectives.clusters.margn'; did you mean 'margin'?"),
        ("data.sources.images.image_sise", 28, "did you mean 'image_size'?"),
        ("optim.lr", "fast", "optim.lr = 'fast' is a text, but a number is needed; correct the value"),
        ("train.num_steps", 1.5, "train.num_steps = 1.5 is a number, but a whole number is needed; correct the value"),
        ("train", None, "train = None is empty, but a section (a mapping of keys to values) is needed; correct"),
        ("data.sources", ["a"], "data.sources = ('a',) is a list, but a section (a mapping of keys to values) is need"),
        ("name", 7, "name = 7 is a whole number, but a text is needed; correct the value"),
        ("seed", 2**32, "seed = 4294967296 is not allowed: it should be less than 4294967296"),
        ("train.num_steps", 0, "train.num_steps = 0 is not allowed: it should be greater than 0"),
        ("parallel.sequence_parallel", "yes please", "is a text, but true or false is needed"),
        ("train.precision", "fp16", "train.precision = 'fp16' is not one of the known values; use fp32 or bf16"),
        ("data.sources.images.kind", "picture", "data.sources.images.kind = 'picture' is not one of the known values"),
        ("encoder.ffn_hidden_size", 0, "encoder.ffn_hidden_size = 0 is not allowed: it should be greater than 0"),
        ("encoder.hidden_size", 65, "encoder: hidden_size = 65 is not divisible by num_attention_heads = 2"),
        ("encoder.hidden_size", 96, "head dim = hidden_size / num_attention_heads = 48 is not divisible by 32"),
        (
            "parallel.tensor_model_parallel_size",
            4,
            "encoder.num_attention_heads = 2 is not divisible by parallel.tensor_model_parallel_size = 4",
        ),
        (
            "parallel.pipeline_model_parallel_size",
            3,
            "encoder.num_layers = 4 is not divisible by the 3 model chunks of the pipeline",
        ),
        ("parallel.context_parallel_size", 2, "context_parallel_size = 2 is not offered: a sample's few"),
        (
            "parallel.overlap_param_gather",
            True,
            "overlap_param_gather = true with use_distributed_optimizer = false and overlap_grad_reduce = false",
        ),
        (
            "parallel.num_layers_in_last_stage",
            3,
            "num_layers_in_last_stage = 3 with pipeline_model_parallel_size = 1 has only one stage",
        ),
        ("parallel.sequence_parallel", True, "sequence_parallel = true with tensor_model_parallel_size = 1"),
        (
            "parallel.virtual_pipeline_model_parallel_size",
            2,
            "virtual_pipeline_model_parallel_size = 2 needs pipeline_model_parallel_size >= 2",
        ),
        (
            "objectives.clusters.source",
            "pages",
            "objectives.clusters.source = 'pages' is not one of data.sources (images)",
        ),
        ("objectives.clusters.margin", 1.2, "margin = 1.2 is outside [0, 1) for cosface"),
        ("objectives.clusters.margin_type", "combined", "margin_type: combined has no combined_margin, and its three"),
        (
            "objectives.clusters.combined_margin",
            [1.0, 0.3, 0.2],
            "combined_margin = [1.0, 0.3, 0.2] has no effect with margin_type: cosface, which reads margin; set",
        ),
        (
            "objectives.clusters.negatives",
            "grouped",
            "negatives: grouped does not say how many class sets to draw; add negative_groups, for instance 4",
        ),
        (
            "objectives.clusters.negative_groups",
            2,
            "negative_groups = 2 has no effect with negatives: per_label; set negatives: grouped or remove",
        ),
        (
            "objectives.clusters.num_sampled",
            101,
            "num_sampled = 101 is more than num_classes = 100; set it to 100 or less, or use sample_rate: 1.0",
        ),
        (
            "objectives.clusters.sample_rate",
            0.0005,
            "sample_rate = 0.0005 of num_classes = 100 draws no negative at all; set sample_rate to 0.01 or more, or",
        ),
        ("objectives.clusters.loss_weight", float("inf"), "loss_weight = inf is not allowed: it should be a finite"),
        ("objectives.clusters.num_sampled", 0, "objectives.clusters.num_sampled = 0 is not allowed: it should be"),
        ("objectives.clusters.sample_rate", 0, "objectives.clusters.sample_rate = 0 is not allowed: it should be"),
        ("objectives.clusters.num_classes", 2**31 + 1, "num_classes = 2147483649 is not allowed: it should be less"),
        ("objectives.clusters.logit_scale", 501, "logit_scale = 501 is not allowed: it should be less than or equal"),
        ("objectives.clusters.compute_dtype", "fp16", "'fp16' is not one of the known values; use auto, float32 or"),
        ("objectives.clusters.backend", "cuda", "'cuda' is not one of the known values; use auto, torch or triton"),
        (
            "optim.class_centers",
            {"first_moment": None},
            "first_moment = None is not one of the known values; use float32, bfloat16 or none",
        ),
        ("optim.class_centers", {"beta1": 1.0}, "optim.class_centers.beta1 = 1.0 is not allowed: it should be less"),
        (
            "encoder.use_head",
            False,
            "encoder.use_head = false leaves no pooled embedding for the objectives (clusters)",
        ),
        (
            "optim.schedule",
            {"warmup_steps": 9, "decay_steps": 5},
            "schedule.warmup_steps = 9 is not below schedule.decay_steps = 5",
        ),
    ],
)
def test_wrong_value_gets_its_sentence(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(changed(path, value), "run.yaml")
    assert message in str(caught.value)


def fp8_sentences(recipe: str, **sections: dict[str, Any]) -> list[str]:
    """The sentences about a configuration whose encoder computes in FP8."""
    data = changed("encoder.fp8", recipe)
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    try:
        config_from_dict(data, "run.yaml")
    except ConfigError as error:
        return [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
    return []


WIDE = {"hidden_size": 256, "ffn_hidden_size": 512}


def test_measuring_may_not_touch_the_scaling_history() -> None:
    held_out = {"data": {"tokens_per_microbatch": 1024}, "evaluation": {"sets": {"clusters": "shards/held_out"}}}
    (sentence,) = fp8_sentences("delayed", **held_out)
    assert "evaluation.sets with encoder.fp8 = delayed: the scaling history would take in the held-out" in sentence
    assert not fp8_sentences("current", **held_out)


def test_a_held_out_set_belongs_to_an_objective() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.sets\.cluster belongs to none of the objectives \(clusters\)"):
        config_from_dict(changed("evaluation", {"sets": {"cluster": "shards/held_out"}}), "test")


@pytest.mark.parametrize(("recipe", "rounded"), [("delayed", 1008), ("current", 1008), ("mxfp8", 1024)])
def test_fp8_needs_a_token_budget_it_can_multiply(recipe: str, rounded: int) -> None:
    (sentence,) = fp8_sentences(recipe, data={"tokens_per_microbatch": 1000})
    assert f"data.tokens_per_microbatch = 1000 is not a multiple of {32 if recipe == 'mxfp8' else 16}" in sentence
    assert sentence.endswith(f"use {rounded}")
    assert not fp8_sentences(recipe, data={"tokens_per_microbatch": rounded})


def test_fp8_budget_of_each_sequence_parallel_rank() -> None:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    (sentence,) = fp8_sentences("blockwise", encoder={**WIDE}, data={"tokens_per_microbatch": 1152}, parallel=parallel)
    assert (
        "is not a multiple of 256, which FP8 matrix products of encoder.fp8 = blockwise need on each of 2 " in sentence
    )


def test_fp8_needs_widths_it_can_multiply() -> None:
    (sentence,) = fp8_sentences("blockwise", encoder={"hidden_size": 192, "ffn_hidden_size": 256})
    assert sentence == (
        "encoder.hidden_size = 192 is not a multiple of 128, which FP8 matrix products of encoder.fp8 = "
        "blockwise need; use another fp8 recipe, a multiple of 128, or fp8: off"
    )
    parallel = {"tensor_model_parallel_size": 2}
    (sentence,) = fp8_sentences("mxfp8", encoder={"hidden_size": 64, "ffn_hidden_size": 96}, parallel=parallel)
    assert "encoder.ffn_hidden_size = 96 is not a multiple of 64" in sentence and "each of 2 tensor-par" in sentence


def test_local_layers_have_nothing_of_transformer_engine() -> None:
    (sentence,) = fp8_sentences("current", encoder={"layer_spec": "local"})
    assert sentence == (
        "encoder: fp8 = current needs Transformer Engine layers, and layer_spec = local has none, so FP8 would be "
        "ignored in silence; set layer_spec: auto, or fp8: off"
    )
    (sentence,) = fp8_sentences("off", encoder={"layer_spec": "local", "attention_backend": "transformer_engine"})
    assert sentence.endswith("layer_spec = local has none; set layer_spec: auto, or attention_backend: auto")


def test_fp8_layers_in_bf16() -> None:
    skips = {"fp8_skip_first_layers": 1, "fp8_skip_last_layers": 1}
    assert not fp8_sentences("current", encoder=skips)
    assert not fp8_sentences("off", encoder={**skips, "fp8_skip_last_layers": 4})
    (sentence,) = fp8_sentences("delayed", encoder=skips)
    assert "cannot be had with fp8 = delayed" in sentence and sentence.endswith("or use fp8: current")
    (sentence,) = fp8_sentences("current", encoder={**skips, "fp8_skip_last_layers": 3})
    assert "fp8_skip_first_layers + fp8_skip_last_layers = 1 + 3 leaves none of the num_layers = 4 to FP8" in sentence
    two_stages = {"pipeline_model_parallel_size": 2}
    (sentence,) = fp8_sentences("current", encoder={"fp8_skip_last_layers": 3}, parallel=two_stages)
    assert sentence.endswith(
        "encoder.fp8_skip_last_layers = 3 is more than the 2 layers of one of 2 equal pipeline stages, which is "
        "megatron-core's limit; use at most 2"
    )


def test_missing_keys_and_all_errors_are_reported_at_once() -> None:
    data = changed("optim.lrr", 1)
    del data["train"]["num_steps"]
    data["encoder"]["hidden_size"] = "wide"
    with pytest.raises(ConfigError) as caught:
        config_from_dict(data, "run.yaml")
    assert str(caught.value).splitlines() == [
        "run.yaml has 3 errors:",
        "  - encoder.hidden_size = 'wide' is a text, but a whole number is needed; correct the value",
        "  - unknown key 'optim.lrr'; did you mean 'lr'?",
        "  - missing key 'train.num_steps': it has no default; add it",
    ]


def test_several_cross_checks_are_reported_at_once() -> None:
    data = changed("parallel.tensor_model_parallel_size", 3)
    data["objectives"]["clusters"]["source"] = "pages"
    with pytest.raises(ConfigError) as caught:
        config_from_dict(data, "run.yaml")
    text = str(caught.value)
    for name, value in (("hidden_size", 64), ("num_attention_heads", 2), ("ffn_hidden_size", 128)):
        sentence = f"encoder.{name} = {value} is not divisible by parallel.tensor_model_parallel_size = 3, so ranks"
        assert sentence in text
    assert "'pages' is not one of" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "key 'a' is given twice, on lines 1 and 3"),
        ("a: 1\nb:\n  c: 2\n  c: 3\n", "key 'c' is given twice, on lines 3 and 4, and only one of them could count"),
        ("a: [1\nb: 2\n", "this is not valid YAML"),
        ("? [1, 2]\n: 3\n", "line 1: the key [1, 2] is a list or a section, but a key is a name; give it one"),
        ("a: &a [*a]\n", "this is not valid YAML (Circular reference detected); correct the file or the path"),
        ("a: 2026-13-01\n", "this is not valid YAML (month must be in 1..12)"),
        ("a: b\x00\n", "this is not valid YAML (unacceptable character #x0000: special characters are not allowed)"),
        ("- a\n- b\n", "holds a list at its top level"),
        ("extends: base.yaml\n", "extends = 'base.yaml' is not a list of file names"),
    ],
)
def test_wrong_yaml_gets_its_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "bad.yaml", text))
    assert message in str(caught.value) and "bad.yaml" in str(caught.value)


def test_missing_file_and_circular_extends(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: gr\xfcn\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: it is not UTF-8 text; check the path"):
        load_config(tmp_path / "latin.yaml")
    write(tmp_path, "a.yaml", {"extends": ["b.yaml"]})
    path = write(tmp_path, "b.yaml", {"extends": ["a.yaml"]})
    with pytest.raises(ConfigError, match="'extends' goes in a circle"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "is not of the form path=value"),
        ("seed.x=1", "'seed' is the value 0, not a section"),
        ("optim..lr=1", "is not of the form path=value"),
        ("optim.lr=1e-3x", "optim.lr = '1e-3x' is a text, but a number is needed; correct the value"),
        ("optim.lr=.nan", "optim.lr = nan is not allowed"),
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'lr'?"),
    ],
)
def test_wrong_override_gets_its_sentence(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "run.yaml", {**valid_config(), "seed": 0})
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)


def test_reading_a_config_does_not_import_torch() -> None:
    code = "import sys, megatron_ove.config.loader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_field_is_listed_in_the_golden_file() -> None:
    """A new option is a visible line in review: add it to the golden file in the same commit."""
    assert GOLDEN.read_text().splitlines() == list(field_paths(load_kinds().train_config))


def test_shipped_recipes_are_valid() -> None:
    examples = Path(__file__).parents[2] / "examples"
    recipes = list(examples.glob("*/config*.yaml"))
    assert recipes, "no recipe found"
    for path in recipes:
        assert load_config(path).name


@pytest.mark.parametrize(
    ("pipeline", "chunks", "first", "last", "message"),
    [
        (2, None, 1, 2, "num_layers_in_first_stage = 1 and parallel.num_layers_in_last_stage = 2 are the only"),
        (2, None, None, 4, "parallel.num_layers_in_last_stage = 4 leaves 0 of encoder.num_layers = 4 for the 1 model"),
        (3, None, 1, None, "leaves 3 of encoder.num_layers = 4 for the 2 model chunks of the other stages"),
        (2, 2, None, 1, "num_layers_in_last_stage = 1 is not divisible by virtual_pipeline_model_parallel_size = 2"),
    ],
)
def test_uneven_stages_that_do_not_fit_get_a_sentence(
    pipeline: int, chunks: int | None, first: int | None, last: int | None, message: str
) -> None:
    data = changed("parallel.pipeline_model_parallel_size", pipeline)
    data["parallel"] |= {"num_layers_in_first_stage": first, "num_layers_in_last_stage": last}
    data["parallel"]["virtual_pipeline_model_parallel_size"] = chunks
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_dict(data, "test")


@pytest.mark.parametrize(
    ("pipeline", "first", "last", "stages"),
    [(1, None, None, [4]), (2, None, None, [2, 2]), (2, None, 1, [3, 1]), (2, 1, 3, [1, 3]), (3, 1, 1, [1, 2, 1])],
)
def test_layers_of_stages(pipeline: int, first: int | None, last: int | None, stages: list[int]) -> None:
    data = changed("parallel.pipeline_model_parallel_size", pipeline)
    data["parallel"] |= {"num_layers_in_first_stage": first, "num_layers_in_last_stage": last}
    assert config_from_dict(data, "test").parallel.layers_of_stages(4) == stages
