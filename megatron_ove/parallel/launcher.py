"""Rank variables from SLURM where no launcher has set them: `srun ... python -m megatron_ove train run.yaml`.

torch reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. torchrun sets them; srun sets variables of its
own, and some of those also where srun started nothing: a batch script has SLURM_PROCID = 0 and SLURM_NTASKS = 8, and
what waits there for seven other ranks waits for ever. Only a process that srun started has SLURM_STEP_ID.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_ove.errors import ConfigError

_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below the ports that Linux hands out by itself
_THIS_MACHINE = re.compile(r"localhost|127\.\d+\.\d+\.\d+|::1")


def slurm_rank_variables(environment: Mapping[str, str], *, has_terminal: bool = False) -> dict[str, str]:
    """Returns the rank variables that SLURM implies and `environment` lacks.

    {} where there is nothing to add: RANK or WORLD_SIZE are there (they win, since under torchrun SLURM's numbers are
    those of the node's launcher), srun did not start this process, or it started it alone.

    Args:
        environment: variables of this process.
        has_terminal: whether its standard input is a terminal.

    Raises:
        ConfigError: SLURM's variables contradict one another or the ones given, so that ranks would wait for ever.
    """
    if "SLURM_STEP_ID" not in environment or "TORCHELASTIC_RUN_ID" in environment:
        return {}
    num_tasks = _number(environment, "SLURM_STEP_NUM_TASKS")
    if num_tasks == 1:
        return {}
    rank = _number(environment, "SLURM_PROCID")
    if "RANK" in environment or "WORLD_SIZE" in environment:
        _check_given(environment, rank, num_tasks)
        return {}
    if has_terminal:
        raise ConfigError(
            f"this terminal belongs to task {rank} of a SLURM step of {num_tasks} tasks (srun --pty), and no other "
            "task runs this command, so it would wait for them for ever; run it with srun to start all tasks, or open "
            "the terminal with srun --ntasks=1 --pty for a run of one process"
        )
    if rank >= num_tasks:
        raise ConfigError(
            f"the environment has SLURM_PROCID = {rank} but SLURM_STEP_NUM_TASKS = {num_tasks}, which are not of the "
            "same step; start the run with srun anew, or unset SLURM_STEP_ID to run one process"
        )
    defaults = {"MASTER_ADDR": _first_address(environment), "MASTER_PORT": str(_port(environment))}
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": str(_number(environment, "SLURM_LOCALID")),
        **{name: value for name, value in defaults.items() if name not in environment},
    }


def first_host(node_list: str) -> str:
    """Returns the first host of a list as SLURM writes it, e.g. node003 of "node[003-7,9],login1"."""
    matched = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", matched[0] if matched else "")


def _check_given(environment: Mapping[str, str], task: int, num_tasks: int) -> None:
    """Refuses RANK and WORLD_SIZE that cannot have been set for this task, e.g. exported by a batch script."""
    rank, world_size = environment.get("RANK", ""), environment.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and world_size.isdecimal()):
        return  # whoever reads them says so
    has_too_few = int(world_size) < num_tasks
    if has_too_few or (int(world_size) == num_tasks and int(rank) != task):
        raise ConfigError(
            f"the environment has RANK = {rank} and WORLD_SIZE = {world_size} in task {task} of a SLURM step of "
            f"{num_tasks} tasks, so several tasks would be the same rank and wait for the missing ones; unset RANK and "
            "WORLD_SIZE, which srun's tasks then take from SLURM"
        )


def _first_address(environment: Mapping[str, str]) -> str:
    given, num_nodes = environment.get("MASTER_ADDR"), _number(environment, "SLURM_STEP_NUM_NODES")
    if given is None:
        return "localhost" if num_nodes == 1 else first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if num_nodes > 1 and _THIS_MACHINE.fullmatch(given):
        raise ConfigError(
            f"the environment has MASTER_ADDR = {given} and this SLURM step has {num_nodes} nodes, so each node would "
            "look for rank 0 on itself and wait for ever; set it to the name of the first node, or unset it"
        )
    return given


def _port(environment: Mapping[str, str]) -> int:
    """Returns a port that jobs and steps that share a node do not share."""
    step = _number(environment, "SLURM_JOB_ID") + _number(environment, "SLURM_STEP_ID")
    return _FIRST_PORT + step % _NUM_PORTS


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.isdecimal():
        state = "lacks it" if text is None else f"has '{text}'"
        raise ConfigError(
            f"srun started this process (SLURM_STEP_ID is set), which needs a number in {name}, but the environment "
            f"{state}; start the run with srun anew, or unset SLURM_STEP_ID to run one process"
        )
    return int(text)
