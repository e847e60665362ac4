"""`megatron-ove plan` counts what samples really hold where their shard sets are there, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ove.cli.main import main
from megatron_ove.planning.devices import find_device
from megatron_ove.planning.plan import make_plan
from megatron_ove.planning.stored_samples import look_at_samples
from megatron_ove.planning.units import device_time, duration, number, operations, parameters
from megatron_ove.shards.writer import ShardWriter
from tests.support.id_shards import encode, id_picture
from tests.support.tiny_run import check, tiny_config, write_config


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 strips of 2 x 8 patches, as a set of words is."""
    folder = tmp_path_factory.mktemp("strips") / "set"
    with ShardWriter(folder, kind="ocr", num_classes=13, label_width=1, samples_per_shard=40, patch_size=14) as writer:
        for i in range(40):
            writer.add(f"strip{i}", {"jpg": encode(id_picture(i, 28, 112))}, [i % 13])
    return folder


def strip_config(path: Path | str, run_dir: Path) -> dict:
    data = tiny_config({"image": "no", "ocr": str(path), "video": "no"}, run_dir)
    data["objectives"] = {"ocr_labels": data["objectives"]["ocr_labels"]}
    data["data"]["sources"] = {"ocr": {"kind": "ocr", "path": str(path), "max_patches": 64}}
    data["data"]["tokens_per_microbatch"] = 256
    data["train"]["global_batch_size"] = 64
    return data


def test_small_pages_cost_less_time_and_as_much_memory(strips: Path, tmp_path: Path) -> None:
    config, device = check(strip_config(strips, tmp_path)), find_device("cpu", world_size=1)
    samples = look_at_samples(config)
    assert samples.mean_patches == {"ocr": 16} and not samples.missing
    worst = make_plan(config, world_size=1, device=device)
    usual = make_plan(config, world_size=1, device=device, samples=samples)
    assert (worst.workload.num_microbatches, usual.workload.num_microbatches) == (16, 4)
    assert worst.workload.real_tokens.sum() == 64 * 64 and usual.workload.real_tokens.sum() == 64 * 16
    assert 0.18 < usual.time.encoder / worst.time.encoder < 0.25  # attention falls with the square
    assert [one.memory for one in usual.ranks] == [one.memory for one in worst.ranks]


def test_the_command_says_which_sizes_it_used(strips: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--world-size", "1", "--gpu", "cpu", "--json", str(tmp_path / "plan.json"), "--suggest"]
    path = write_config(strip_config(strips, tmp_path / "run"), tmp_path / "config.yaml")
    assert main(["plan", str(path), *arguments]) == 0
    text = capsys.readouterr().out
    assert "For time and messages samples count as they are stored (ocr 16 patches on average), for memory at" in text
    assert "0.0 days" not in text and " 0 Tflop" not in text and "process-seconds" in text
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["patches_of_stored_samples"] == {"ocr": 16}
    path = write_config(strip_config(tmp_path / "nowhere", tmp_path / "run"), tmp_path / "config.yaml")
    assert main(["plan", str(path), *arguments]) == 0
    assert "Every sample counts at its largest size, since there is no shard set to look at." in capsys.readouterr().out
    slower = json.loads((tmp_path / "plan.json").read_text())
    assert slower["samples_per_s"] < content["samples_per_s"] / 2
    assert slower["ranks"][0]["memory_bytes"] == content["ranks"][0]["memory_bytes"]


def test_a_source_without_a_set_counts_at_its_largest_size_and_is_named(strips: Path, tmp_path: Path, capsys) -> None:
    data = strip_config(strips, tmp_path / "run")
    data["data"]["sources"]["image"] = {"kind": "image", "path": str(tmp_path / "absent"), "image_size": 28}
    data["objectives"]["images"] = {"kind": "partial_fc", "source": "image", "num_classes": 9, "sample_rate": 1.0}
    path = write_config(data, tmp_path / "config.yaml")
    assert main(["plan", str(path), "--world-size", "1", "--gpu", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "(ocr 16 patches on average)" in text
    assert f"Samples of image count at their largest size: the shard set {tmp_path}/absent does not exist" in text


def test_a_number_of_classes_left_to_a_set_that_is_not_there_is_a_sentence(tmp_path: Path, capsys) -> None:
    data = strip_config(tmp_path / "nowhere", tmp_path / "run")
    del data["objectives"]["ocr_labels"]["num_classes"]
    path = write_config(data, tmp_path / "config.yaml")
    for command in (["plan", str(path), "--world-size", "1"], ["inspect", str(path)], ["train", str(path)]):
        assert main(command) == 2
        sentence = "objectives.ocr_labels.num_classes is taken from this set, so write the number where there is no set"
        assert sentence in capsys.readouterr().err


def test_numbers_have_the_unit_that_fits() -> None:
    assert [duration(s) for s in (9e5, 7200, 90, 2.5, 0.0123)] == [
        *(("10.4", "days"), ("2", "hours"), ("1.5", "minutes"), ("2.5", "seconds"), ("12.3", "milliseconds"))
    ]
    assert (device_time(9e5), device_time(0.25)) == (("250", "hours"), ("0.25", "seconds"))
    assert [operations(n) for n in (3.21e9, 1.5e12, 4e15, 5.0)] == ["3.21 Gflop", "1.5 Tflop", "4 Pflop", "5 flop"]
    assert [parameters(n) for n in (704, 98_304, 315_509_760)] == ["704", "98.3 K", "315.5 M"]
    assert [number(n) for n in (999.6, 12_345.6, 0.01234)] == ["1,000", "12,346", "0.0123"]
