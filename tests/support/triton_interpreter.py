"""A process whose Triton interprets its kernels: the choice falls when Triton is first imported."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def interpreting_process(begin: Callable[[], Any]) -> Iterator[Callable[..., Any]]:
    """Yields a function that calls another one, with its arguments, in such a process.

    Args:
        begin: called there first.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("OMP_NUM_THREADS", "1")
            pool.submit(begin).result(timeout=100)
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(timeout=200)
