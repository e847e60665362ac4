"""`ReadAhead`: members of samples, read by many threads while another step is decoded.

One read after the other would leave a network disk idle: at 2 to 5 ms a read that is 200 to 500 samples a second,
whatever the disk could deliver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_ove.data.shard_index import ReadError, ShardSet

PAUSES_S = (0.1, 0.5, 2.0)
"""Before each new attempt to read a member; a disk that is briefly away is back after them or not soon."""

MemberReader = Callable[[int, str], bytes]
"""Returns the bytes of (row, member); raises a DataError that names the sample."""


class StepReads:
    """The members of one step, one read of each, in progress or done."""

    def __init__(self, reads: dict[tuple[int, int, str], Future[bytes]]) -> None:
        self._reads = reads

    def reader_of(self, source: int) -> MemberReader:
        """Returns what waits for the members of one source; only those that were asked for can be had."""
        return lambda row, member: self._reads[source, row, member].result()

    def cancel(self) -> None:
        """Gives up what has not begun."""
        for read in self._reads.values():
            read.cancel()


class ReadAhead:
    """A pool of reading threads for the shard sets of a run."""

    def __init__(self, shard_sets: Sequence[ShardSet], num_threads: int) -> None:
        """
        Args:
            shard_sets: one for each source, in their order.
            num_threads: reads at a time.
        """
        self._shard_sets = tuple(shard_sets)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")

    def start(self, wanted: Iterable[tuple[int, int, str]]) -> StepReads:
        """Starts reading (source, row, member), each once however often it is named."""
        return StepReads(
            {
                (source, row, member): self._pool.submit(read_patiently, self._shard_sets[source], row, member)
                for source, row, member in dict.fromkeys(wanted)
            }
        )

    def close(self) -> None:
        """Ends the threads; each when it is done with the read that it has begun, which nobody waits for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


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
