"""A short timeout for collectives in steps, a long one around them.

The first step compiles, tunes and connects, and a save writes for minutes, so these need a long timeout. In any other
step a rank that makes the others wait for minutes is dead or hangs, and an hour of many devices is lost to find out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.errors import TrainingError
from megatron_ove.parallel.timeouts import is_collective_timeout, set_collective_timeout, wait_for_all_ranks


class StepTimeout:
    """Context manager around the loop of a run: the long timeout to begin with, and again when it is left."""

    def __init__(self, config: ParallelConfig) -> None:
        """
        Args:
            config: `timeout_s` and `step_timeout_s`.
        """
        self._long = config.timeout_s
        self._short = min(config.step_timeout_s, config.timeout_s)
        self._is_short = False
        self._step: int | None = None

    def __enter__(self) -> StepTimeout:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """
        Raises:
            TrainingError: in place of an error that says that a collective has waited too long.
        """
        was_short = self._is_short
        self._lengthen()
        if is_collective_timeout(error):
            name, seconds = ("step_timeout_s", self._short) if was_short else ("timeout_s", self._long)
            place = "before the first step was done" if self._step is None else f"after step {self._step}"
            raise TrainingError(
                f"this rank waited {seconds} s for another one {place} and gave up (parallel.{name} = {seconds}), so "
                "some rank has died, hangs, or is that much slower; look in the logs for the first message of a rank "
                f"that says something else (docs/debugging.md), or raise parallel.{name} if it really takes that long"
            ) from error

    def after_step(self, step: int) -> None:
        """Takes note of a step; after the first one of a launch the short timeout holds. Collective."""
        self._step = step
        if not self._is_short:
            self._shorten()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The long timeout for a while, e.g. for a save; collective at its end."""
        was_short = self._is_short
        self._lengthen()
        yield
        if was_short:
            self._shorten()

    def _shorten(self) -> None:
        wait_for_all_ranks()  # or the first to shorten it would not wait for one who is not here yet
        set_collective_timeout(self._short)
        self._is_short = True

    def _lengthen(self) -> None:
        if self._is_short:
            set_collective_timeout(self._long)
        self._is_short = False
