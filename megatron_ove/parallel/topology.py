"""Which rank does what: sizes, ranks and process groups of one run. The only importer of mcore's parallel_state.

Ranks are laid out tensor-fastest, then data, then pipeline: ranks of one tensor group are neighbours and share a node.
Everybody else is handed a `ParallelTopology` or a single group from it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.errors import ConfigError
from megatron_ove.parallel import cpu_backend
from megatron_ove.parallel.launcher import slurm_rank_variables

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParallelTopology:
    """Sizes, ranks and groups, as seen from one process.

    Attributes:
        first_stage_layers, last_stage_layers: transformer layers of these stages; None = as many as the others.
        data_host_group: the replicas, for tensors on the CPU; used by the thread that prepares steps and nobody else,
            since collectives of two threads must not meet in one group.
        replica_host_group: the tensor and pipeline ranks of this replica, likewise.
        class_group: the tensor and data ranks of this pipeline stage, over which class tables are sharded.
        process_groups: megatron-core's view of the same groups, for its modules and optimizer.
    """

    world_size: int
    global_rank: int
    tensor_size: int
    tensor_rank: int
    pipeline_size: int
    pipeline_rank: int
    virtual_pipeline_size: int | None
    first_stage_layers: int | None
    last_stage_layers: int | None
    data_size: int
    data_rank: int
    sequence_parallel: bool
    device: torch.device
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    data_host_group: dist.ProcessGroup
    replica_host_group: dist.ProcessGroup
    class_group: dist.ProcessGroup
    process_groups: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank is on the first pipeline stage, whatever the model chunk."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank is on the last pipeline stage, whatever the model chunk."""
        return self.pipeline_rank == self.pipeline_size - 1

    def is_first_chunk(self, vp_stage: int | None) -> bool:
        """Whether model chunk `vp_stage` of this rank holds the patch embedding."""
        return self.is_first_stage and not vp_stage

    def is_last_chunk(self, vp_stage: int | None) -> bool:
        """Whether model chunk `vp_stage` of this rank holds the final norm and the pooling head."""
        return self.is_last_stage and (self.virtual_pipeline_size is None or vp_stage == self.virtual_pipeline_size - 1)


def initialize_topology(config: ParallelConfig, *, seed: int) -> ParallelTopology:
    """Starts communication and lays the parallel grid over the ranks.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or what SLURM says instead (launcher.py); without
    either it is a run of one process. An already initialised torch.distributed is used as it is. NCCL with CUDA, else
    gloo and the CPU backend.

    Args:
        config: sizes of the grid.
        seed: of megatron-core's random states; dropout is all that uses them.

    Raises:
        ConfigError: the world size, device or environment do not fit `config`.
    """
    rank, world_size, local_rank = _read_environment()
    check_world_size(config, world_size)
    device = _resolve_device(config, local_rank)
    if device.type == "cpu":
        cpu_backend.install()
    else:
        cpu_backend.repair_gpu_checkpoints()
    _initialize_communication(config, rank, world_size, device)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=config.timeout_s / 60,  # type: ignore[arg-type]  # goes into a timedelta
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    topology = _describe(config, device)
    logger.info(
        "rank %d of %d: tensor %d/%d, pipeline %d/%d, data %d/%d on %s",
        *(topology.global_rank, topology.world_size, topology.tensor_rank, topology.tensor_size),
        *(topology.pipeline_rank, topology.pipeline_size, topology.data_rank, topology.data_size, device),
    )
    return topology


def destroy_topology() -> None:
    """Ends communication and removes the CPU backend; does nothing when nothing was started."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    cpu_backend.uninstall()


def check_world_size(config: ParallelConfig, world_size: int) -> None:
    """Checks that the grid fits `world_size` processes.

    Raises:
        ConfigError: world size is not a multiple of tensor x pipeline.
    """
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    replica = tensor * pipeline
    if world_size % replica == 0:
        return
    below, above = world_size // replica * replica, (world_size // replica + 1) * replica
    counts = f"{below} or {above}" if below else f"{above}"
    raise ConfigError(
        f"world size {world_size} is not divisible by tensor_model_parallel_size x pipeline_model_parallel_size = "
        f"{tensor} x {pipeline} = {replica}, so some processes would belong to no model replica; "
        f"start {counts} processes or change the sizes",
        on_every_rank=True,
    )


def _read_environment() -> tuple[int, int, int]:
    """Returns (rank, world size, local rank); (0, 1, 0) outside a launcher."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
    os.environ.update(slurm_rank_variables(os.environ))  # torch reads them there
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not given:
        return 0, 1, int(os.environ.get("LOCAL_RANK", "0"))
    needed = ["RANK", "WORLD_SIZE"] + ["MASTER_ADDR", "MASTER_PORT"] * (os.environ.get("WORLD_SIZE", "1") != "1")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}, so the processes cannot find one "
            "another; start with torchrun, or unset RANK and WORLD_SIZE to run one process"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))


def _resolve_device(config: ParallelConfig, local_rank: int) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError(
            "parallel.device = cuda but torch sees no CUDA device; set parallel.device: auto to run on the CPU, or "
            "check the driver and CUDA_VISIBLE_DEVICES"
        )
    if config.device == "cpu" or not has_cuda:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK = {local_rank} but this node shows {torch.cuda.device_count()} CUDA devices, and each process "
            f"needs its own; start at most {torch.cuda.device_count()} processes per node, and under srun give every "
            "task all devices of its node (no --gpus-per-task)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _initialize_communication(config: ParallelConfig, rank: int, world_size: int, device: torch.device) -> None:
    if dist.is_initialized():
        return
    options: dict[str, Any] = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=config.timeout_s)}
    if world_size == 1:
        options["store"] = dist.HashStore()  # one process needs no address and no port
    if device.type == "cuda":
        options["device_id"] = device
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = ":".join(os.environ.get(name, "none") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(
            f"rank {rank} of {world_size} could not meet the others at MASTER_ADDR:MASTER_PORT = {address} "
            f"({str(error).splitlines()[0]}); check that this is the node of rank 0, that every rank was started and "
            "that no other program has the port"
        ) from error


def _describe(config: ParallelConfig, device: torch.device) -> ParallelTopology:
    data_host_group, replica_host_group = _host_groups(timedelta(seconds=config.timeout_s))
    groups: dict[str, Any] = {
        "tensor_group": parallel_state.get_tensor_model_parallel_group(),
        "pipeline_group": parallel_state.get_pipeline_model_parallel_group(),
        "data_group": parallel_state.get_data_parallel_group(),
        "data_host_group": data_host_group,
        "replica_host_group": replica_host_group,
        "class_group": parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    }
    return ParallelTopology(
        world_size=dist.get_world_size(),
        global_rank=dist.get_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        virtual_pipeline_size=config.virtual_pipeline_model_parallel_size,
        first_stage_layers=config.num_layers_in_first_stage,
        last_stage_layers=config.num_layers_in_last_stage,
        data_size=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        sequence_parallel=config.sequence_parallel,
        device=device,
        process_groups=ProcessGroupCollection.use_mpu_process_groups(),
        **groups,
    )


def _host_groups(timeout: timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Returns this rank's replicas and this rank's replica, as groups for tensors on the CPU; collective."""
    data: Any = parallel_state.get_data_parallel_group()
    replica: Any = parallel_state.get_model_parallel_group()
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    ranks = torch.arange(dist.get_world_size()).view(-1, data.size(), tensor)  # [pipeline, data, tensor]
    by_place = ranks.transpose(1, 2).reshape(-1, data.size())
    by_replica = ranks.transpose(0, 1).reshape(data.size(), -1)
    return _host_group(data, by_place, timeout), _host_group(replica, by_replica, timeout)


def _host_group(like: dist.ProcessGroup, ranks: torch.Tensor, timeout: timedelta) -> dist.ProcessGroup:
    """Returns this rank's row of `ranks`, [groups, ranks of a group], as a group; `like` itself where it is alone."""
    if like.size() == 1:
        return like
    groups: dict[tuple[int, ...], Any] = {}
    for row in ranks.tolist():  # all ranks make all of them
        groups[tuple(row)] = dist.new_group(row, timeout=timeout, backend="gloo")
    return groups[tuple(dist.get_process_group_ranks(like))]
