"""One run at a time writes to a file that runs continue: two would each rewrite it without what the other one added."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ove.errors import DataError

_log = logging.getLogger(__name__)
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a network disk that is mounted without them


@contextmanager
def sole_writer(path: str | Path) -> Iterator[None]:
    """Keeps other runs from writing to `path` until the block is left.

    A file `path`.lock beside it is locked and removed at the end. The kernel ends the lock with the process, however
    that dies, so a lock file that is left over hinders nobody. What is there and no regular file (/dev/null) is not
    locked.

    Raises:
        DataError: another run writes to it.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        yield
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(target.name + ".lock")
    descriptor = _locked(lock, target)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is free: whoever opened it meanwhile finds it gone and makes a new one
        os.close(descriptor)


def _locked(lock: Path, target: Path) -> int:
    """Returns the descriptor of the lock file, locked by this process."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            if error.errno in _NO_LOCKS:
                _log.warning(
                    "%s cannot be locked on this disk (%s); see to it that no other run writes to it", target, error
                )
                return descriptor
            os.close(descriptor)
            if error.errno not in _TAKEN:
                raise
            raise DataError(
                f"another run writes to {target} ({holder or 'its process is not known'}), and two at once would lose "
                "what one of them did; wait for its end, or write to another file"
            ) from error
        if _is_same(lock, descriptor):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # its holder removed it after it was opened here


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
