"""The launch script on a real SLURM of two nodes: the quick start's configuration gives one machine's losses with both
launchers, and a run cut by its time limit goes back into the queue and ends as if it had not been cut.

The tests build on one another, because starting processes is what takes the time here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

import pytest
import yaml

from megatron_ove.data.synthetic import write_synthetic_shard_set
from tests.integration.test_resume import read_tensors, rows
from tests.support.distributed import run_distributed
from tests.support.slurm_cluster import ROOT, SlurmCluster, missing_requirement, running_cluster

MISSING = missing_requirement()
pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(400)]

COMPARED_STEPS = 20
# SLURM looks at time limits every 30 s and sends the signal when its next look might be too late: here 10 to 40 s after
# the start. So training must take longer than that, but not much longer.
TIME_LIMIT = ("--time=2", "--signal=B:USR1@80")
LONG_RUN_S = 38.0

SITE_PROFILE = f"""
export PYTHON={sys.executable}
export GLOO_SOCKET_IFNAME={{interface}}
RENDEZVOUS_HOST={{host}}
"""


@dataclass(frozen=True)
class StoppedRun:
    """An uninterrupted run on two nodes, ended by a stop file."""

    job: str
    run_dir: Path
    last_step: int


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    # A short path: munge's socket has at most 108 characters.
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start's configuration on synthetic shards, with a narrow encoder and without an end."""
    folder = tmp_path_factory.mktemp("config")
    # Without namespaces all nodes are this machine, and nobody knows them by their names.
    network = (
        {"interface": "eth0", "host": ""} if cluster.has_namespaces else {"interface": "lo", "host": gethostname()}
    )
    (folder / "site.env").write_text(SITE_PROFILE.format(**network))
    quickstart = ROOT / "examples/quickstart/config.yaml"
    classes = {o["source"]: o["num_classes"] for o in yaml.safe_load(quickstart.read_text())["objectives"].values()}
    shapes = {
        "images": ("image", {"num_samples": 24, "picture_size": (56, 56)}),
        "pages": ("ocr", {"num_samples": 20, "picture_size": (42, 56), "label_width": 12}),
        "clips": (
            "video",
            {"num_samples": 14, "grid_height": 2, "grid_width": 2, "frames": 16, "selected_patches": 16},
        ),
    }
    for name, (kind, shape) in shapes.items():
        write_synthetic_shard_set(folder / name, kind=kind, num_classes=classes[name], **shape)
    sources = {name: {"path": str(folder / name), "max_patches": 16} for name in shapes}
    sources["images"] = {"path": str(folder / "images"), "image_size": 28}
    for name, weight in (("images", 2.0), ("pages", 1.0), ("clips", 1.0)):
        sources[name]["weight"] = weight
    heads = yaml.safe_load(quickstart.read_text())["objectives"]
    data = {
        "extends": [str(quickstart)],
        "objectives": {name: {"centering": "none"} for name in heads},  # it depends on what shares a microbatch
        "encoder": {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "rope_temporal_size": 16,
        },
        "data": {"sources": sources, "tokens_per_microbatch": 64, "num_threads": 1},
        "optim": {
            "lr": 8e-4,
            "schedule": {"kind": "constant", "warmup_steps": 2},
        },  # so that a rate is not a question of the end
        "train": {"num_steps": 1_000_000, "global_batch_size": 8, "log_interval_steps": 1},
        "checkpoint": {"interval_steps": 100_000, "save_initial": False},
        "tracking": {"tensorboard": False},
        "parallel": {"tensor_model_parallel_size": 2, "timeout_s": 120},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def one_process(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the first steps on this machine, without SLURM and without parallelism."""
    run_dir = tmp_path_factory.mktemp("one_process")
    settings = (
        f"run_dir={run_dir}",
        "parallel.tensor_model_parallel_size=1",
        f"train.stop_after_steps={COMPARED_STEPS}",
    )
    command = [sys.executable, "-m", "megatron_ove", "train", str(config), *set_options(*settings)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return losses(run_dir)


@pytest.fixture(scope="module")
def stopped_run(cluster: SlurmCluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> StoppedRun:
    """Two nodes under srun, stopped for good as soon as there is enough to compare."""
    return run_and_stop(cluster, config, tmp_path_factory.mktemp("stopped"), seconds=0)


def run_and_stop(cluster: SlurmCluster, config: Path, run_dir: Path, *, seconds: float) -> StoppedRun:
    """Trains `COMPARED_STEPS` steps under srun, goes on for about so many seconds, and stops for good."""
    job = submit(cluster, config, ["--time=10"], f"run_dir={run_dir}", LAUNCHER="srun")
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < COMPARED_STEPS:
        assert cluster.state(job) in ("PENDING", "RUNNING") and time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.2)
    time.sleep(seconds)
    (run_dir / "stop").touch()
    assert cluster.wait(job, 60) == "COMPLETED", cluster.output(job)
    return StoppedRun(job, run_dir, int(rows(run_dir)[-1]["step"]))


def set_options(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def submit(cluster: SlurmCluster, config: Path, options: list[str], *settings: str, **environment: str) -> str:
    profile = str(config.with_name("site.env"))
    arguments = [str(config), *set_options(*settings)]
    return cluster.submit(["--nodes=2", *options], arguments, SITE_PROFILE=profile, **environment)


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir)[:COMPARED_STEPS]]


def assert_equal_tensors(first: Path, second: Path) -> None:
    """Weights, class centers and moments are the same to the bit."""
    (tensors, _), (others, _) = (run_distributed(read_tensors, 1, str(folder))[0] for folder in (first, second))
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer", "objectives"}
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not tensors[name].equal(others[name])] == []


def test_srun_on_two_nodes_gives_one_process_losses(stopped_run, one_process):
    assert len(one_process) == COMPARED_STEPS
    assert losses(stopped_run.run_dir) == pytest.approx(one_process, rel=1e-5)
    (log,) = (stopped_run.run_dir / "logs").iterdir()
    assert "rank 0 of 2: tensor 0/2" in log.read_text()


def test_torchrun_on_two_nodes_gives_one_process_losses(cluster, config, one_process, tmp_path):
    job = submit(cluster, config, ["--time=30"], f"run_dir={tmp_path}", f"train.num_steps={COMPARED_STEPS}")
    assert cluster.wait(job, 120) == "COMPLETED", cluster.output(job)
    assert losses(tmp_path) == pytest.approx(one_process, rel=1e-5)
    assert json.loads((tmp_path / "done").read_text())["step"] == COMPARED_STEPS


def test_a_stop_file_ends_a_job_for_good(cluster, stopped_run):
    output = cluster.output(stopped_run.job)
    assert f"stopped by the file {stopped_run.run_dir}/stop: not requeued" in output
    assert f"the ranks ended with exit status 0 at step {stopped_run.last_step}" in output
    assert not (stopped_run.run_dir / "done").exists()


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_torchrun_job_cut_by_its_time_limit_ends_as_if_it_had_not_been(
    cluster, config, one_process, tmp_path, tmp_path_factory
):
    long_run = run_and_stop(cluster, config, tmp_path_factory.mktemp("long"), seconds=LONG_RUN_S)
    end = long_run.last_step
    arguments = (f"run_dir={tmp_path}", f"train.num_steps={end}")
    job = submit(cluster, config, list(TIME_LIMIT), *arguments)
    deadline = time.monotonic() + 120
    while not ("requeued" in cluster.output(job) and cluster.state(job) == "PENDING"):
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.2)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # cut once is enough
    assert cluster.wait(job, 150) == "COMPLETED", cluster.output(job)
    output = cluster.output(job)
    for part in ("attempt 0 on node[1-2]: torchrun", "the time limit is near", "requeued", "attempt 1", "is finished"):
        assert output.count(part) >= 1, output
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [f"{job}.{n}.log" for n in (0, 1)]
    assert "Resumed from" in (tmp_path / f"logs/{job}.1.log").read_text()
    assert json.loads((tmp_path / "done").read_text())["step"] == end
    assert not (tmp_path / "stop").exists()

    assert losses(tmp_path) == pytest.approx(one_process, rel=1e-5)
    assert rows(tmp_path) == rows(long_run.run_dir)
    last = f"checkpoints/step_{end:08d}"
    assert_equal_tensors(long_run.run_dir / last, tmp_path / last)

    again = submit(cluster, config, ["--time=2"], *arguments)
    assert cluster.wait(again, 60) == "COMPLETED", cluster.output(again)
    assert "the run is finished" in cluster.output(again)
    assert f"All {end} steps are done." in (tmp_path / f"logs/{again}.0.log").read_text()


def test_a_wrong_configuration_ends_the_job_at_once(cluster, config, tmp_path):
    job = submit(cluster, config, ["--time=2"], f"run_dir={tmp_path}/run", "train.num_step=3")
    assert cluster.wait(job, 60) == "FAILED"
    assert cluster.output(job).count("did you mean 'num_steps'") == 1
    assert not (tmp_path / "run").exists()


def test_what_srun_really_sets_makes_ranks(cluster):
    """Four tasks on two nodes are four ranks that agree; a batch script, which SLURM numbers too, is one process."""
    code = (
        "import json, os; from megatron_ove.parallel.launcher import slurm_rank_variables as read; "
        "print(json.dumps(read(os.environ)))"
    )
    tasks = ("srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", sys.executable, "-c", code)
    ranks = sorted((json.loads(line) for line in cluster.call(*tasks).splitlines()), key=lambda rank: rank["RANK"])
    assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    assert {(rank["WORLD_SIZE"], rank["MASTER_ADDR"]) for rank in ranks} == {("4", "node1")}
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    batch = f"--output={cluster.folder}/batch.out", f"--wrap={sys.executable} -c '{code}'"
    job = cluster.call("sbatch", "--parsable", "--nodes=2", "--ntasks=4", *batch).strip()
    assert cluster.wait(job, 30) == "COMPLETED"
    assert (cluster.folder / "batch.out").read_text() == "{}\n"
