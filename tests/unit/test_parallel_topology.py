"""World sizes, devices and environments that do not fit: the sentence the user gets."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from megatron.core import optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.errors import ConfigError
from megatron_ove.parallel import cpu_backend
from megatron_ove.parallel.topology import check_world_size, destroy_topology, initialize_topology


@pytest.mark.parametrize(("world_size", "counts"), [(3, "4"), (7, "4 or 8"), (1, "4")])
def test_world_size_must_be_divisible(world_size: int, counts: str) -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with pytest.raises(ConfigError) as error:
        check_world_size(config, world_size)
    assert str(error.value) == (
        f"world size {world_size} is not divisible by tensor_model_parallel_size x pipeline_model_parallel_size = "
        f"2 x 2 = 4, so some processes would belong to no model replica; start {counts} processes or change the sizes"
    )


def test_divisible_world_size_is_accepted() -> None:
    check_world_size(ParallelConfig(tensor_model_parallel_size=2), 6)


def test_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="has RANK, WORLD_SIZE but not MASTER_ADDR, MASTER_PORT, so the processes"):
        initialize_topology(ParallelConfig(), seed=0)


def test_nobody_answers_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening, so that nobody else answers either
        taken.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", **address}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError) as error:
            initialize_topology(ParallelConfig(device="cpu", timeout_s=1), seed=0)
    destroy_topology()
    where = ":".join(address.values())
    assert str(error.value).startswith(f"rank 1 of 2 could not meet the others at MASTER_ADDR:MASTER_PORT = {where} (")
    assert "check that this is the node of rank 0, that every rank was started" in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.device = cuda but torch sees no CUDA device; set"):
        initialize_topology(ParallelConfig(device="cuda"), seed=0)


def test_cpu_backend_refuses_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="cannot be installed while a CUDA device is visible, because it redirects"):
        cpu_backend.install()


def test_cpu_backend_refuses_an_unchecked_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpu_backend.megatron.core, "__version__", "0.17.0")
    with pytest.raises(ConfigError, match=re.escape("was checked with megatron-core 0.16.1 and this is 0.17.0")):
        cpu_backend.install()


@pytest.mark.parametrize("torch_adamw", [False, True])
def test_gpus_get_the_repairs_of_checkpoints_alone(monkeypatch: pytest.MonkeyPatch, torch_adamw: bool) -> None:
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", torch_adamw)
    monkeypatch.setattr(cpu_backend._Installed, "saved", [])
    monkeypatch.setattr(cpu_backend._Installed, "mode", None)
    original = DistributedOptimizer.sharded_param_state_fully_reshardable
    for _ in range(2):
        cpu_backend.repair_gpu_checkpoints()
        names = [name for _, name, _ in cpu_backend._Installed.saved]
        assert names[0] == "sharded_param_state_fully_reshardable" and len(names) == (4 if torch_adamw else 1)
        assert DistributedOptimizer.sharded_param_state_fully_reshardable is not original
    cpu_backend.uninstall()
    assert DistributedOptimizer.sharded_param_state_fully_reshardable is original


def test_gpus_refuse_an_unchecked_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend._Installed, "saved", [])
    monkeypatch.setattr(cpu_backend.megatron.core, "__version__", "0.17.0")
    with pytest.raises(ConfigError, match=re.escape("was checked with megatron-core 0.16.1 and this is 0.17.0")):
        cpu_backend.repair_gpu_checkpoints()


_ONE_PROCESS = """
import torch
import torch.distributed as dist
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.parallel.topology import destroy_topology, initialize_topology
for _ in range(2):  # a second start in the same process works
    topology = initialize_topology(ParallelConfig(device="cpu"), seed=0)
    assert topology.device.type == "cpu" and topology.world_size == 1
    assert topology.is_first_chunk(None) and topology.is_last_chunk(None)
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    destroy_topology()
    assert not torch.distributed.is_initialized()
try:
    torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError):
    print("undone")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is for machines without a CUDA device")
def test_one_process_needs_no_launcher_and_leaves_nothing() -> None:
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", _ONE_PROCESS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "undone", done.stderr


def test_destroy_without_start_does_nothing() -> None:
    before = torch.cuda.current_device
    destroy_topology()
    assert not dist.is_initialized()
    assert torch.cuda.current_device is before
