"""`run_dir/lock`: one launch at a time in a run folder; two would destroy each other's metrics and checkpoints.

Rank 0 takes it before it changes anything and removes it when it ends. A launch that was killed leaves it behind. The
next one may take it over when the holder is certainly gone: on this machine, when no process has its number and start
time; for an earlier attempt of the same SLURM job, always; from elsewhere, when the heartbeat is older than
`DEAD_AFTER_S`, within the same attempt of a SLURM job `STEP_DEAD_AFTER_S`. A thread writes the heartbeat, so neither a
save nor a load stops it.

Surprising: a holder can lose its lock while it lives (stopped for longer than that, or left over from an earlier
attempt of its job). So it looks before every save whether the lock is still its own, and ends if it is not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType

from megatron_ove.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

LOCK_FILE_NAME = "lock"
BEAT_INTERVAL_S = 30.0
# Twenty heartbeats: far more than clocks of machines differ by, and than a file server is usually away for. Too short
# a limit would cost a living holder its run, but no checkpoint: it looks before it saves.
DEAD_AFTER_S = 600.0
# Inside one attempt of a SLURM job the clocks are one cluster's, and who starts again is most often the same script.
STEP_DEAD_AFTER_S = 90.0
_PAUSE_S = 1.0
_GUARD_PAUSE_S, _GUARD_DEAD_AFTER_S = 0.05, 60.0
_FILE_BYTES = 1024
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class LockHolder:
    """The content of a lock file.

    Attributes:
        token: of this launch alone.
        host: name of the machine, for people.
        namespace: boot of the machine and its process numbers' namespace; `pid` means something only where it is equal.
        pid: process number of rank 0.
        process_start: start of that process in clock ticks since the boot; None where the system does not say.
        job: SLURM's job number; None outside SLURM.
        restart: how often SLURM has requeued that job.
        since: when the lock was taken, in seconds since 1970.
        beat: time of the last heartbeat.
    """

    token: str
    host: str
    namespace: str
    pid: int
    process_start: int | None
    job: str | None
    restart: int
    since: float
    beat: float

    @classmethod
    def of_this_process(cls) -> LockHolder:
        """Describes this process as a holder from now on."""
        now, pid = time.time(), os.getpid()
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            namespace=_namespace(),
            pid=pid,
            process_start=_process_start(pid),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=now,
            beat=now,
        )

    def is_gone(self, newcomer: LockHolder) -> bool:
        """Whether `newcomer`, this process, may take the lock over."""
        if self.job is not None and self.job == newcomer.job and self.restart != newcomer.restart:
            return self.restart < newcomer.restart  # SLURM has ended that attempt, or is about to
        if self.namespace == newcomer.namespace:
            return not _is_alive(self.pid, self.process_start)
        is_same_attempt = self.job is not None and self.job == newcomer.job
        return newcomer.since - self.beat > (STEP_DEAD_AFTER_S if is_same_attempt else DEAD_AFTER_S)

    def to_text(self) -> str:
        """Returns the file's content, always of one length, so that a heartbeat can be written over the last one."""
        return json.dumps(asdict(self)).ljust(_FILE_BYTES - 1) + "\n"

    def __str__(self) -> str:
        job = f" of SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {_date(self.since)}, last heard of {_date(self.beat)}"


class RunLock:
    """The lock of one launch; as a context manager it keeps the heartbeat going and removes the lock at the end."""

    def __init__(self, run_dir: Path) -> None:
        """Takes the lock.

        Args:
            run_dir: folder of the run; must exist.

        Raises:
            ConfigError: another launch that may be alive holds it; nothing was changed.
            OSError: the folder cannot be written.
        """
        self._run_dir, self._path = run_dir, run_dir / LOCK_FILE_NAME
        self._holder = LockHolder.of_this_process()
        self._new_owner = ""
        self._writing = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        while not self._create() and not self._take_over():
            pass

    def __enter__(self) -> RunLock:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # what ends the run is said by others
            if self._is_own():
                self._path.unlink()

    def beat(self) -> None:
        """Says that the run is alive. A disk that refuses is a warning only.

        Raises:
            TrainingError: another launch has taken the lock over.
        """
        try:
            with self._writing:
                self._refresh()
        except OSError as error:
            logger.warning(
                "%s cannot be refreshed (%s); after %d minutes another launch may take the run folder for unused.",
                self._path,
                error.strerror,
                DEAD_AFTER_S // 60,
            )
        self.require()

    def require(self) -> None:
        """Costs nothing: goes by the last heartbeat.

        Raises:
            TrainingError: another launch has taken the lock over.
        """
        if self._new_owner:
            raise TrainingError(
                f"the run folder {self._run_dir} was taken over by another launch ({self._new_owner}), because this "
                "one gave no sign of life or is an earlier attempt of its job; it stops here and saves nothing, so "
                "that the other's checkpoints stay whole; let the other one go on"
            )

    def _keep_beating(self) -> None:
        # Once it is lost, the trainer is told before its next step.
        while not self._new_owner and not self._end.wait(BEAT_INTERVAL_S):
            with contextlib.suppress(TrainingError):
                self.beat()

    def _refresh(self) -> None:
        self._holder = replace(self._holder, beat=time.time())
        try:
            stream = self._path.open("r+", encoding="utf-8", errors="replace")
        except FileNotFoundError:  # somebody deleted it
            if not self._create():
                self._refresh()
            return
        with stream:  # in place: after a takeover the stream is no longer the lock, and writing to it does no harm
            found = _parse(stream.read())
            if found is not None and found.token != self._holder.token:
                self._new_owner = str(found)
                return
            stream.seek(0)
            stream.write(self._holder.to_text())
            stream.truncate()

    def _create(self) -> bool:
        """Puts the lock in place whole, or not at all; returns whether it is there."""
        return self._put(self._path) or self._is_own()  # NFS may repeat a request whose answer was lost

    def _put(self, path: Path) -> bool:
        """Makes a file with this launch's content, unless there is one; returns whether it was made."""
        partial = self._write_partial()
        try:
            return _link(partial, path)
        finally:
            partial.unlink()

    def _write_partial(self) -> Path:
        partial = self._path.with_name(f"{LOCK_FILE_NAME}.{self._holder.token}.tmp")
        partial.write_text(self._holder.to_text(), encoding="utf-8")
        return partial

    def _take_over(self) -> bool:
        """Puts this launch's lock in the place of a dead holder's; raises for one that may be alive.

        Of several newcomers one at a time may do that, and looks again: the others' lock may be there by now. The dead
        lock gives way in one move, so that nobody finds the place empty and makes a lock that would then be replaced.

        Returns:
            Whether it was done; else there was nothing to replace any more, or another one is about to.
        """
        require_unlocked(self._run_dir, self._holder)
        guard = self._path.with_name(f"{LOCK_FILE_NAME}.takeover")
        if not self._put(guard):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - guard.stat().st_mtime > _GUARD_DEAD_AFTER_S:
                    guard.unlink()
            time.sleep(_GUARD_PAUSE_S)
            return False
        try:
            if require_unlocked(self._run_dir, self._holder) is None and not self._is_no_lock():
                return False
            self._write_partial().replace(self._path)
            return True
        finally:
            guard.unlink(missing_ok=True)

    def _is_no_lock(self) -> bool:
        """Whether something else than a lock lies in its place."""
        try:
            return _parse(self._path.read_text(encoding="utf-8", errors="replace")) is None
        except FileNotFoundError:
            return False

    def _is_own(self) -> bool:
        found = _read(self._path)
        return found is not None and found.token == self._holder.token


def require_unlocked(run_dir: Path, newcomer: LockHolder | None = None) -> LockHolder | None:
    """Checks that no launch that may be alive holds the run folder; changes nothing.

    Args:
        run_dir: folder of the run.
        newcomer: who asks; None = this process.

    Returns:
        The dead holder; None when there is no lock or one that cannot be read, after a warning.

    Raises:
        ConfigError: naming the holder.
    """
    path = run_dir / LOCK_FILE_NAME
    holder = _read(path)
    if holder is None:
        time.sleep(_PAUSE_S if path.exists() else 0)  # a network disk may show a file before its content
        holder = _read(path)
    if holder is None:
        if path.exists():
            logger.warning("%s is no lock file (cut, or written by something else); it does not count.", path)
        return None
    if not holder.is_gone(newcomer or LockHolder.of_this_process()):
        raise ConfigError(
            f"run_dir = {run_dir} is in use by {holder}, and two launches in one folder would destroy each other's "
            f"metrics and checkpoints; wait until it has ended, stop it by a file {run_dir / 'stop'}, or give this run "
            f"another run_dir; if that process is certainly gone, delete {path}"
        )
    return holder


def _read(path: Path) -> LockHolder | None:
    """Returns the holder; None when there is no file or none of ours."""
    try:
        return _parse(path.read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(text: str) -> LockHolder | None:
    try:
        values = json.loads(text)
        holder = LockHolder(**{field.name: values[field.name] for field in fields(LockHolder)})
        _ = holder.beat + holder.since + holder.restart + holder.pid
    except (ValueError, KeyError, TypeError):
        return None
    return holder


def _link(source: Path, target: Path) -> bool:
    """Gives a file a second name, unless that one is taken; returns whether it was free."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        try:
            with target.open("x", encoding="utf-8") as stream:
                stream.write(source.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _is_alive(pid: int, start: int | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's, and the system may hide more of it
        return start is None or _process_start(pid) in (start, None)
    return start is None or _process_start(pid) == start


def _process_start(pid: int) -> int | None:
    """Returns field 22 of /proc/PID/stat; None where there is no /proc, and for a process that has ended (a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *values = stat.rpartition(")")[2].split()  # the name in brackets can hold anything
    return None if state in "ZX" else int(values[18])


def _namespace() -> str:
    """Returns what two processes share if one can see the other by its number; the host's name without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
