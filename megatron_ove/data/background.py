"""`BackgroundSteps`: a thread that makes the items of successive steps ahead of the thread that takes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_S = 0.1
"""How often a waiting thread looks whether it should stop."""


class BackgroundSteps(Generic[T]):
    """Calls `make(step)` for one step after the other.

    Taking an item is what permits the next one to be begun. So after the last `take`, a thread that finishes what is
    permitted has made exactly as many items on every rank; `make` may therefore talk to other ranks.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        *,
        first_step: int,
        end_step: int | None,
        ahead: int,
        finishes: bool,
        name: str,
    ) -> None:
        """Starts the thread.

        Args:
            make: returns the item of a step; called in the thread.
            first_step: first step.
            end_step: no item is made for this step or later ones; None = there is no last one.
            ahead: items that may be made, or in the making, before they are taken.
            finishes: whether `stop` lets the thread make all that is permitted, because other ranks count on it.
            name: of the thread.
        """
        self._make = make
        self._end_step = end_step
        self._finishes = finishes
        self._permits = threading.Semaphore(ahead)
        self._items: queue.Queue[T | BaseException] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first_step,), name=name, daemon=True)
        self._thread.start()

    def take(self) -> T:
        """Returns the next item, waiting for it.

        Raises:
            BaseException: what `make` raised; then it makes no more.
            RuntimeError: the thread was stopped, or has made its last item.
        """
        while True:
            try:
                item = self._items.get(timeout=_POLL_S)
            except queue.Empty:
                if not self._thread.is_alive() and self._items.empty():
                    raise RuntimeError("the loader is closed") from None
                continue
            if isinstance(item, BaseException):
                raise item
            self._permits.release()
            return item

    def stop(self, timeout_s: float) -> bool:
        """Lets the thread end; returns whether it has within `timeout_s`. May be called more than once."""
        self._stop.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self, step: int) -> None:
        try:
            while (self._end_step is None or step < self._end_step) and self._may_go_on():
                self._items.put(self._make(step))
                step += 1
        except BaseException as error:
            self._items.put(error)

    def _may_go_on(self) -> bool:
        """Waits for a permit; False when the thread is to stop."""
        while not self._stop.is_set():
            if self._permits.acquire(timeout=_POLL_S):
                return True
        # Looked at after the stop was seen: a permit from before it is never missed.
        return self._finishes and self._permits.acquire(blocking=False)
