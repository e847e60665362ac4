"""Which rank a process is, from its environment alone. Environments are as SLURM 22.05 was seen to set them."""

from __future__ import annotations

import re

import pytest

from megatron_ove.errors import ConfigError
from megatron_ove.parallel.launcher import first_host, slurm_rank_variables

JOB = {"SLURM_JOB_ID": "40017", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {
    **JOB,
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node07", "MASTER_PORT": "20019"}


def test_a_task_of_srun_is_a_rank() -> None:
    assert slurm_rank_variables(STEP) == RANK


def test_an_address_that_is_given_is_kept() -> None:
    added = slurm_rank_variables({**STEP, "MASTER_ADDR": "node07-ib", "MASTER_PORT": "29500"})
    assert added == {name: RANK[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def test_tasks_of_one_node_need_no_name_resolution() -> None:
    added = slurm_rank_variables({**STEP, "SLURM_STEP_NUM_NODES": "1", "MASTER_PORT": "29500"})
    assert added["MASTER_ADDR"] == "localhost" and "MASTER_PORT" not in added


@pytest.mark.parametrize(
    "environment",
    [
        {},
        JOB,  # a batch script: task 0 of 4, but nobody started the other three
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --ntasks=1, with or without a terminal
        # the interactive step in which salloc may open its shell
        {**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"},
        {**STEP, **RANK},  # e.g. enroot's hook
        # torchrun, one task a node: its worker 1 of 2 on the node of task 0
        {**STEP, **RANK, "RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "TORCHELASTIC_RUN_ID": "x"},
        # another launcher, one task a node
        {**STEP, **RANK, "RANK": "5", "WORLD_SIZE": "16", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_nothing_is_added_where_srun_started_no_ranks(environment: dict[str, str]) -> None:
    assert slurm_rank_variables(environment) == {}
    assert slurm_rank_variables(environment, has_terminal=True) == {}


@pytest.mark.parametrize(
    ("changes", "has_terminal", "sentence"),
    [
        (
            {},
            True,
            r"this terminal belongs to task 3 of a SLURM step of 4 tasks \(srun --pty\), and no other task runs",
        ),
        ({"SLURM_PROCID": "4"}, False, "has SLURM_PROCID = 4 but SLURM_STEP_NUM_TASKS = 4, which are not of the same"),
        ({"MASTER_ADDR": "127.0.0.1"}, False, "MASTER_ADDR = 127.0.0.1 and this SLURM step has 2 nodes, so each node"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, False, "RANK = 0 and WORLD_SIZE = 4 in task 3 of a SLURM step of 4 tasks"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False, "RANK = 0 and WORLD_SIZE = 1 in task 3 .* unset RANK and WORLD_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, False, r"number in SLURM_STEP_NUM_TASKS, but the environment has 'many'"),
    ],
)
def test_environments_in_which_ranks_would_wait_for_ever(
    changes: dict[str, str], has_terminal: bool, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        slurm_rank_variables({**STEP, **changes}, has_terminal=has_terminal)


def test_a_step_without_its_variables_is_named() -> None:
    environment = {name: value for name, value in STEP.items() if name != "SLURM_LOCALID"}
    with pytest.raises(ConfigError, match=re.escape("needs a number in SLURM_LOCALID, but the environment lacks it")):
        slurm_rank_variables(environment)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("node[003-7,9],login1", "node003"),
        ("node[12,14]", "node12"),
        ("rack[2-3]-node[01-16]-ib", "rack2-node01-ib"),
        ("gpu-a,gpu-b[1-2]", "gpu-a"),
    ],
)
def test_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host
