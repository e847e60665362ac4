"""Python's garbage collection at the same steps on every rank.

Left to itself every process collects when its own allocations say so. A pause of one rank then holds up all others,
and with many ranks some rank pauses in every step. Here all of them pause together, and seldom.
"""

from __future__ import annotations

import gc
from types import TracebackType


class StepwiseCollection:
    """Context manager in which garbage is collected by `after_step` only; afterwards Python is as it was."""

    def __init__(self, interval_steps: int) -> None:
        """
        Args:
            interval_steps: steps between collections.
        """
        self._interval_steps = interval_steps
        self._is_first = True
        self._was_enabled = False

    def __enter__(self) -> StepwiseCollection:
        self._is_first, self._was_enabled = True, gc.isenabled()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collects when `step` is a multiple of the interval, and after the first step of a launch.

        What lives after the first step lives on: modules, optimizer, caches. It is frozen, so that later collections
        look only at what was made since.
        """
        if self._is_first:
            self._is_first = False
            gc.collect()
            gc.freeze()
        elif step % self._interval_steps == 0:
            gc.collect()
