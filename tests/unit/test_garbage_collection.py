"""Garbage is collected after the same steps on every rank, and Python is as it was afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_ove.training.garbage_collection import StepwiseCollection


@contextmanager
def watched_collections() -> Iterator[list[str]]:
    """Yields a list that gets an entry for every collection, whoever starts it."""
    calls: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            calls.append(f"generation {info['generation']}")

    gc.callbacks.append(note)
    try:
        yield calls
    finally:
        gc.callbacks.remove(note)


def collected_steps(first: int, last: int) -> list[int]:
    """The steps after which a launch that does these steps collects, while each makes plenty of garbage."""
    steps = []
    with StepwiseCollection(3) as collection, watched_collections() as calls:
        for step in range(first, last + 1):
            _ = [[object(), {}] for _ in range(20_000)]
            assert calls == []
            collection.after_step(step)
            steps += [step] * len(calls)
            calls.clear()
    return steps


def test_the_steps_do_not_depend_on_the_launch_except_for_its_first() -> None:
    whole = collected_steps(1, 12)
    assert whole == [1, 3, 6, 9, 12]
    assert collected_steps(1, 4) == [1, 3]
    assert collected_steps(5, 12) == [5, 6, 9, 12]
    assert collected_steps(6, 7) == [6], "once, also where the first step is one of them"


def test_garbage_of_a_step_is_gone_and_what_lasts_is_not_looked_at() -> None:
    class Node:
        alive = 0

        def __init__(self) -> None:
            self.itself = self
            Node.alive += 1

        def __del__(self) -> None:
            Node.alive -= 1

    with StepwiseCollection(2) as collection:
        collection.after_step(1)
        frozen = gc.get_freeze_count()
        assert frozen > 0
        Node()
        collection.after_step(3)
        assert Node.alive == 1
        collection.after_step(4)
        assert Node.alive == 0
        assert gc.get_freeze_count() <= frozen


def test_python_is_as_it_was() -> None:
    assert gc.isenabled()
    for _ in range(2):
        with StepwiseCollection(10) as collection:
            assert not gc.isenabled()
            collection.after_step(1)
        assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    try:
        with StepwiseCollection(10):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
