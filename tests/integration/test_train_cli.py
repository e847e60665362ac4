"""The command line as a user meets it: what it prints, what it leaves behind, how it says that something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_ove.cli.main import main
from tests.support.tiny_run import tiny_config, write_config, write_tiny_sources

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_ove", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, timeout=timeout_s, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def trained(sources, tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """A finished run of two processes under torchrun; returns (config file, run folder, what was printed)."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny_config(sources, folder / "run", parallel={"timeout_s": 60, "tensor_model_parallel_size": 2})
    data["train"] |= {"num_steps": 6}
    data["tracking"] = {"tensorboard": True}
    path = write_config(data, folder / "config.yaml")
    result = call("train", str(path), "--nproc", "2", "--set", "checkpoint.interval_steps=4")
    assert result.returncode == 0, result.stderr
    return path, folder / "run", result


def test_a_run_leaves_everything_in_its_folder(trained):
    _, run_dir, result = trained
    assert {path.name for path in run_dir.iterdir()} == {
        "config.resolved.yaml",
        "console.log",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "done",
    }
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    resolved = (run_dir / "config.resolved.yaml").read_text()
    assert resolved in result.stdout
    assert yaml.safe_load(resolved)["checkpoint"]["interval_steps"] == 4
    assert "step 6/6  loss" in result.stderr and "image_labels" in result.stderr
    assert "step 6/6  loss" in (run_dir / "console.log").read_text()


def test_metrics_have_the_promised_names(trained):
    row = json.loads((trained[1] / "metrics.jsonl").read_text().splitlines()[-1])
    heads = ("image_labels", "ocr_labels", "video_labels")
    names = {"step", "samples", "loss", "grad_norm", "lr", "samples_per_s", "tokens_per_s", "data_wait_share"}
    names |= {"step_time_s", "padding_share", "time", *(f"loss/{h}" for h in heads), *(f"grad_norm/{h}" for h in heads)}
    assert names <= set(row)
    assert (row["step"], row["samples"]) == (6, 48)
    assert 0 <= row["padding_share"] < 1 and 0 <= row["data_wait_share"] <= 1
    weights = {"image_labels": 1.0, "ocr_labels": 0.5, "video_labels": 2.0}
    assert row["loss"] == pytest.approx(sum(weights[h] * row[f"loss/{h}"] for h in heads), rel=1e-6)


def test_a_finished_run_is_not_trained_again(trained):
    path, run_dir, _ = trained
    before = (run_dir / "metrics.jsonl").read_text()
    result = call("train", str(path), "--nproc", "2")
    assert result.returncode == 0 and "All 6 steps are done." in result.stderr
    assert "Resumed from" in result.stderr  # another configuration (checkpoint.interval_steps): said by the trainer
    assert (run_dir / "metrics.jsonl").read_text() == before
    # That launch found the checkpoint and marked the run done, so the same command starts nothing.
    again = ["train", str(path)]
    code = f"import sys; from megatron_ove.cli.main import main; print(main({again!r}), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert result.stdout == "0 False\n"
    assert "All 6 steps are done. Raise train.num_steps to train on." in result.stderr


def test_a_finished_run_goes_on_when_it_gets_more_steps(trained, tmp_path):
    run_dir = shutil.copytree(trained[1], tmp_path / "run")
    (run_dir / "stop").touch()  # left behind by an earlier launch
    more = ("--set", f"run_dir={run_dir}", "--set", "train.num_steps=7")
    longer = call("train", str(trained[0]), *more, "--nproc", "2")
    assert longer.returncode == 0 and "Resumed from" in longer.stderr and "All 7 steps are done." in longer.stderr
    assert not (run_dir / "stop").exists()
    assert json.loads((run_dir / "done").read_text())["step"] == 7


def test_another_architecture_in_the_run_folder_is_a_sentence(trained):
    path, run_dir, _ = trained
    result = call("train", str(path), "--nproc", "2", "--set", "encoder.ffn_hidden_size=128")
    sentence = (
        f"the checkpoint {run_dir}/checkpoints/step_00000006 holds another model: encoder.ffn_hidden_size is 96 there "
        "and 128 here; set the fields as they are in the checkpoint, or use another run_dir to train a new model"
    )
    assert result.returncode == 2
    assert result.stderr.count(sentence) == 1
    assert "Traceback" not in result.stderr


def test_inspect_describes_a_checkpoint_and_finds_damage(trained, capsys):
    _, run_dir, _ = trained
    assert main(["inspect", str(run_dir), "--verify"]) == 0
    text = capsys.readouterr().out
    for part in ("step_00000006", "6 of 6", "4 layers, hidden 64", "11 classes x 64 = 704", "2 processes: tensor 2"):
        assert part in text
    damaged = run_dir / "checkpoints/step_00000004/__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert main(["inspect", str(damaged.parent)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(damaged.parent), "--verify"]) == 2
    assert "its file __0_0.distcp has the checksum" in capsys.readouterr().out


def test_inspect_describes_a_shard_set(sources, tmp_path, capsys):
    assert main(["inspect", sources["ocr"]]) == 0
    text = capsys.readouterr().out
    assert "ocr" in text and "20" in text and "13" in text
    assert main(["inspect", str(tmp_path)]) == 2
    assert "so there is nothing to describe; check the path" in capsys.readouterr().err


def test_inspect_says_how_full_the_microbatches_of_a_configuration_are(sources, tmp_path, capsys):
    data = tiny_config(sources, tmp_path / "run", train={"global_batch_size": 32})
    data["data"]["tokens_per_microbatch"] = 256
    path = write_config(data, tmp_path / "config.yaml")
    assert main(["inspect", str(path), "--replicas", "3", "1", "--steps", "4"]) == 0
    text = capsys.readouterr().out
    assert "tiny: the first 4 steps, largest sample 16 patches" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    own = {row[0]: row for row in rows if len(row) == 6 and row[0].isdecimal()}
    assert list(own) == ["1", "3"]
    assert float(own["3"][2]) <= float(own["1"][2]) <= 256, "patches of a microbatch"
    (now,) = [row for row in rows if row[0] == "256 (now)"]
    assert [cell.rstrip(" *") for cell in now[1:]] == [own["1"][3], own["3"][3]], "padding is told twice, alike"
    assert main(["inspect", str(path), "--steps", "0"]) == 2
    assert "--steps and --replicas count something; give numbers of at least 1" in capsys.readouterr().err


def test_a_wrong_configuration_is_a_sentence_at_once(sources, tmp_path):
    data = tiny_config(sources, tmp_path / "run", train={"num_step": 3})
    path = write_config(data, tmp_path / "config.yaml")
    call_main = f"print(main(['train', {str(path)!r}]), 'torch' in sys.modules)"
    code = f"import sys; from megatron_ove.cli.main import main; {call_main}"
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert result.stdout == "2 False\n"  # without torch a mistake is found in a fraction of a second
    assert result.stderr.startswith("megatron-ove: ") and "did you mean 'num_steps'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_world_size_that_does_not_fit_is_a_sentence(sources, tmp_path):
    data = tiny_config(sources, tmp_path / "run", parallel={"tensor_model_parallel_size": 2})
    result = call("train", str(write_config(data, tmp_path / "config.yaml")))
    assert result.returncode == 2
    assert "world size 1 is not divisible by tensor_model_parallel_size x pipeline_model_parallel_size" in result.stderr


def test_sigterm_saves_and_ends_with_status_0(sources, tmp_path):
    data = tiny_config(sources, tmp_path / "run", train={"num_steps": 10000})
    path = write_config(data, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "megatron_ove", "train", str(path)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        metrics = tmp_path / "run/metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    (folder,) = (tmp_path / "run/checkpoints").iterdir()
    step = int(folder.name.removeprefix("step_"))
    assert f"Stopped after step {step} (SIGTERM was received); the same command continues." in errors
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == step


def test_pictures_that_one_rank_cannot_decode_end_all_ranks_soon_with_one_sentence(sources, tmp_path):
    """Rank 0 of the tensor group decodes; rank 1 learns from it what is missing, and counts alike."""
    damaged = tmp_path / "damaged"
    shutil.copytree(sources["image"], damaged)
    (shard,) = (damaged / "shards").glob("*.tar")
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"\xff\xd8\xff", b"\x00\x00\x00"))  # no JPEG starts there any more
    parallel = {"timeout_s": 600, "tensor_model_parallel_size": 2}
    data = tiny_config({**sources, "image": str(damaged)}, tmp_path / "run", parallel=parallel)
    result = call("train", str(write_config(data, tmp_path / "config.yaml")), "--nproc", "2", timeout_s=300)
    assert result.returncode != 0
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("megatron-ove: ")]
    # Half of a step's eight samples are images, and eleven samples are more than the share of the first thousand.
    assert (
        "12 of the 24 samples up to step 3 could not be read, more than data.max_bad_samples_share = 0.01" in sentence
    )
    assert "Step 1 goes on without 4 of its samples" in result.stderr and "image0000" in result.stderr
    assert "Traceback" not in result.stderr


def test_steps_that_are_not_finite_are_refused_and_then_end_the_run(sources, tmp_path):
    data = tiny_config(sources, tmp_path / "run", optim={"lr": 1e30, "schedule": {"warmup_steps": 0}})
    result = call("train", str(write_config(data, tmp_path / "config.yaml")))
    assert result.returncode == 2
    refused = [line for line in result.stderr.splitlines() if "was refused and changed nothing" in line]
    assert len(refused) == 3
    assert (
        "the loss of objective 'image_labels' is nan in a microbatch with these samples of source 'image'" in refused[0]
    )
    assert "image0000" in refused[0]
    assert "3 steps in a row up to step" in result.stderr and "continue from the last checkpoint" in result.stderr
    assert not list((tmp_path / "run/checkpoints").glob("*"))
