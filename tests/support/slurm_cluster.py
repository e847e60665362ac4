"""A real SLURM of two nodes on this machine, for tests of the launch script. The work is done by slurm_local.sh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "ip", "unshare")
_SCRIPT = Path(__file__).with_name("slurm_local.sh")
_SBIN = "/usr/sbin:/sbin"


def missing_requirement() -> str | None:
    """Returns why no cluster can be started here, None if one can."""
    path = f"{os.environ['PATH']}:{_SBIN}"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return (
            f"needs SLURM: {', '.join(missing)} not found; apt-get install slurmctld slurmd slurm-client munge iproute2"
        )
    return None


class SlurmCluster:
    """Two nodes, `node1` and `node2`. Root gives each a network namespace, so a host name and an address of its own;
    for others both are this machine, with different ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": f"{os.environ['PATH']}:{_SBIN}",
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
        }

    @property
    def has_namespaces(self) -> bool:
        return "NET=netns" in (self.folder / "state").read_text().splitlines()

    def call(self, *command: str, timeout_s: float = 30, **environment: str) -> str:
        """Runs a command of SLURM; returns what it printed."""
        variables = {**self.environment, **environment}
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, options: Sequence[str], arguments: Sequence[str], **environment: str) -> str:
        """Submits the launch script; returns the job id. Its output goes to `output_file`."""
        script = str(ROOT / "examples/slurm/launch.sbatch")
        output = f"--output={self.folder}/%j.out"
        return self.call("sbatch", "--parsable", output, *options, script, *arguments, **environment).strip()

    def output(self, job: str) -> str:
        """Returns what the launch script has printed so far."""
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def state(self, job: str) -> str:
        """Returns e.g. RUNNING or COMPLETED."""
        found = re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", "--oneliner", job))
        assert found is not None
        return found[1]

    def wait(self, job: str, timeout_s: float) -> str:
        """Returns the state in which the job ended."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, f"job {job} is still {state}:\n{self.output(job)}"
            time.sleep(0.3)
        return state


@contextmanager
def running_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Starts a cluster and leaves nothing of it behind."""
    cluster = SlurmCluster(folder)
    try:
        started = subprocess.run(
            [str(_SCRIPT), "up", str(folder), "--nodes", "2", "--cpus", "2", "--gpus", "0"],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert started.returncode == 0, started.stderr
        yield cluster
    finally:
        subprocess.run([str(_SCRIPT), "down", str(folder)], capture_output=True, timeout=60, check=False)
