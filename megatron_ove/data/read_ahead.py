"""`ReadAhead`: members of samples, read by many threads while another step is decoded.

One read after the other would leave a network disk idle: at 2 to 5 ms a read that is 200 to 500 samples a second,
whatever the disk could deliver.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from megatron_ove.shards.shard_set import ReadError, ShardSet

PAUSES_S = (0.1, 0.5, 2.0)
"""Before each new attempt to read a member; a disk that is briefly away is back after them or not soon."""

MemberReader = Callable[[int, str], bytes]
"""Returns the bytes of (row, member); raises a DataError that names the sample."""

Member = tuple[int, int, str]
"""Number of a source, row, name of a member."""


class StepReads:
    """The members of one step, one read of each, in progress or done; each is kept until it was used."""

    def __init__(self, uses: Counter[Member], reads: dict[Member, Future[bytes]]) -> None:
        self._uses = uses
        self._reads = reads

    def reader_of(self, source: int) -> MemberReader:
        """Returns what waits for the members of one source, each as often as it was asked for."""

        def read(row: int, member: str) -> bytes:
            wanted = (source, row, member)
            self._uses[wanted] -= 1
            return (self._reads[wanted] if self._uses[wanted] else self._reads.pop(wanted)).result()

        return read

    def cancel(self) -> None:
        """Gives up what has not begun."""
        for read in self._reads.values():
            read.cancel()


class ReadAhead:
    """A pool of reading threads for the shard sets of a run.

    Not an executor of the standard library: at its end a process would wait for every read that a dead disk holds up.
    """

    def __init__(self, shard_sets: Sequence[ShardSet], num_threads: int) -> None:
        """
        Args:
            shard_sets: one for each source, in their order.
            num_threads: reads at a time.
        """
        self._shard_sets = tuple(shard_sets)
        self._tasks: queue.SimpleQueue[tuple[Future[bytes], Member] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"reader {number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, wanted: Iterable[Member]) -> StepReads:
        """Starts reading, each member once however often it is named."""
        uses = Counter(wanted)
        reads: dict[Member, Future[bytes]] = {member: Future() for member in uses}
        for member, read in reads.items():
            self._tasks.put((read, member))
        return StepReads(uses, reads)

    def close(self) -> None:
        """Ends the threads; each when it is done with the read that it has begun, which nobody waits for."""
        for _ in self._threads:
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            read, (source, row, member) = task
            if not read.set_running_or_notify_cancel():
                continue
            try:
                read.set_result(read_patiently(self._shard_sets[source], row, member))
            except BaseException as error:
                read.set_exception(error)


def read_patiently(shards: ShardSet, row: int, member: str) -> bytes:
    """Returns a member's bytes, with three more attempts: EIO, ESTALE and short reads of a network disk often pass.

    Raises:
        ReadError: the last attempt's.
    """
    for pause in PAUSES_S:
        try:
            return shards.read(row, member)
        except ReadError:
            time.sleep(pause)
    return shards.read(row, member)
