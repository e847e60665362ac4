"""Steps made ahead in a thread: in order, no further than permitted, and as many on every rank at the end."""

from __future__ import annotations

import threading

import pytest

from megatron_ove.data.background import BackgroundSteps


def test_items_come_in_order_and_not_beyond_the_end() -> None:
    steps = BackgroundSteps(lambda step: step, first_step=3, end_step=6, ahead=2, finishes=False, name="t")
    assert [steps.take() for _ in range(3)] == [3, 4, 5]
    with pytest.raises(RuntimeError, match="the loader is closed"):
        steps.take()
    assert steps.stop(10)


def test_nothing_is_begun_before_it_is_permitted() -> None:
    begun: list[int] = []
    steps = BackgroundSteps(
        lambda step: begun.append(step), first_step=0, end_step=None, ahead=2, finishes=True, name="t"
    )
    for taken in range(1, 5):
        steps.take()
        assert len(begun) <= taken + 2
    assert steps.stop(10)
    assert begun == list(range(6))  # all that was permitted, whenever the stop came


def test_one_that_does_not_finish_leaves_permitted_items_alone() -> None:
    may_end = threading.Event()
    begun: list[int] = []

    def make(step: int) -> int:
        begun.append(step)
        may_end.wait(30)
        return step

    steps = BackgroundSteps(make, first_step=0, end_step=None, ahead=5, finishes=False, name="t")
    assert not steps.stop(0.01)
    may_end.set()
    assert steps.stop(10)
    assert len(begun) <= 1


def test_what_make_raises_is_raised_by_take() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise KeyError("no such step")
        return step

    steps = BackgroundSteps(make, first_step=0, end_step=None, ahead=3, finishes=True, name="t")
    assert steps.take() == 0
    with pytest.raises(KeyError, match="no such step"):
        steps.take()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        steps.take()
    assert steps.stop(10)
