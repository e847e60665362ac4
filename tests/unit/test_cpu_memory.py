"""Memory that a CPU run frees is used again, unless the environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PAGES = 50_000
# Page faults of a block that is written, freed, and made and written again.
_SCRIPT = f"""
import ctypes, os, resource
from megatron_ove.training.cpu_memory import prepare_cpu_memory

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * ({_PAGES} * resource.getpagesize())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 kB whatever the machine prefers
kept = prepare_cpu_memory()
print(kept, faults_of_a_block(), faults_of_a_block(), os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


def _run(**variables: str) -> tuple[bool, int, int, int]:
    ours = ("MALLOC_", "ONEDNN_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | variables
    command = [sys.executable, "-c", _SCRIPT]
    kept, *numbers = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    first, second, kernels = map(int, numbers)
    return kept == "True", first, second, kernels


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about glibc")
def test_freed_memory_is_used_again() -> None:
    kept, first, second, kernels = _run()
    assert kept and kernels == 64
    assert first > 0.9 * _PAGES and second < 0.01 * _PAGES


def test_the_environment_goes_first() -> None:
    kept, first, second, kernels = _run(MALLOC_MMAP_THRESHOLD_="131072", ONEDNN_PRIMITIVE_CACHE_CAPACITY="7")
    assert not kept and kernels == 7
    assert min(first, second) > 0.9 * _PAGES
