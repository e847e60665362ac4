"""A result folder that appears only when it is complete.

It is filled under a name of its own beside the target, `.NAME.writing-HOST-BOOT-NAMESPACE-PID-RANDOM`, which no user's
folder has, and renamed at the end. So an error or a kill leaves the target as it was. What a killed writer leaves
behind is removed by the next writer of the same target if that process is certainly gone (same machine since the same
start, same namespace of process numbers, no such process), and else named in a warning. Host names are not enough:
machines on one disk may share theirs.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ove.errors import DataError, MegatronOveError

logger = logging.getLogger(__name__)

_WRITING, _REPLACED = "writing", "replaced"
_BOOT_DIGITS = 12  # all 32 would leave less of the 255 letters that a name may have


class NewFolder:
    """A folder in the making: fill `path`, then `publish` or `discard` it. `new_folder` does this for a block.

    Attributes:
        target: where it will appear.
        path: temporary folder beside the target, with the rights that the umask gives.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        replace_if: Callable[[Path], bool] | None = None,
        error: type[MegatronOveError] = DataError,
    ) -> None:
        """Makes the temporary folder; parents of the target are made as well.

        Args:
            target: must not exist or be an empty folder, unless `replace_if` allows more. A link is followed.
            replace_if: whether a folder that is not empty may be replaced, asked now and again before it is done;
                None = never.
            error: class of the errors.

        Raises:
            MegatronOveError: of class `error`; the target must not be replaced, or nothing can be written there.
        """
        self.target = Path(target)
        self._place = Path(os.path.realpath(target))
        self._replace_if = replace_if
        self._error = error
        with self._sentences():
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            self._require_free()
            self.path = self._own_name(_WRITING)
            self.path.mkdir()  # not mkdtemp, whose folders nobody else can enter

    def publish(self) -> None:
        """Puts the folder in the target's place; after an error the old one is still there and the new one is gone.

        Raises:
            MegatronOveError: of class `error`; something has taken the place meanwhile, or it cannot be written.
        """
        try:
            with self._sentences():
                if self._require_free():
                    self.path.rename(self._place)  # an empty folder there gives way
                else:
                    self._swap()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes what was written so far; nothing if it was published or discarded already."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _swap(self) -> None:
        old = self._own_name(_REPLACED)
        self._place.rename(old)
        try:
            self.path.rename(self._place)
        except BaseException:
            old.rename(self._place)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            logger.warning("%s, which %s has replaced, cannot be removed; delete it by hand.", old, self.target)

    def _require_free(self) -> bool:
        """Returns whether nothing has to be replaced; raises if that is not allowed."""
        if os.path.ismount(self._place):
            raise self._error(
                f"{self.target} is the root of a mounted disk, so a folder cannot appear there in one move; name a "
                "folder inside it"
            )
        if not self._place.exists() or (self._place.is_dir() and not any(self._place.iterdir())):
            return True
        if self._replace_if is None:
            raise self._error(
                f"{self.target} exists already and would be overwritten; name another folder, or delete it first"
            )
        if not self._place.is_dir() or not self._replace_if(self._place):
            raise self._error(
                f"{self.target} exists and holds something else than what would replace it, so it is not overwritten; "
                "name another folder, or delete it yourself"
            )
        return False

    def _own_name(self, state: str) -> Path:
        owner = f"{_machine()}-{_process_namespace()}-{os.getpid()}"
        return self._place.with_name(f".{self._place.name}.{state}-{owner}-{secrets.token_hex(4)}")

    def _clear_leftovers(self) -> None:
        """Removes what dead writers of this target left, and names what may belong to living ones."""
        name = re.compile(
            rf"\.{re.escape(self._place.name)}\.({_WRITING}|{_REPLACED})-(.+)-(\d+)-(\d+)-[0-9a-f]{{8}}", re.DOTALL
        )
        here = (_machine(), str(_process_namespace()))
        for path in sorted(self._place.parent.iterdir()):
            match = name.fullmatch(path.name)
            if match is None or path.is_symlink():
                continue
            state, host, namespace, pid = match.groups()
            if (host, namespace) != here or _is_alive(int(pid)):
                logger.warning(
                    "%s belongs to process %s on %s, which writes %s too or was killed; delete it when that process is "
                    "certainly gone.",
                    *(path, pid, host, self.target),
                )
            elif state == _REPLACED and not self._place.exists():
                path.rename(self._place)
                logger.warning("%s was put back: a killed process had moved it away to replace it.", self.target)
            else:
                shutil.rmtree(path, ignore_errors=True)
                logger.warning("%s was left by a killed process and has been removed.", path)

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turns an error of the disk into one of the caller's."""
        try:
            yield
        except OSError as error:
            raise self._error(
                f"{self.target} cannot be written ({error.strerror or error}); check free space and permissions, then "
                "repeat"
            ) from error


@contextmanager
def new_folder(
    target: str | Path,
    *,
    replace_if: Callable[[Path], bool] | None = None,
    error: type[MegatronOveError] = DataError,
) -> Iterator[Path]:
    """Gives a temporary folder to fill, which becomes `target` at the end of the block and vanishes after an error.

    Args and errors as for `NewFolder`; an `OSError` inside the block counts as one of writing.
    """
    folder = NewFolder(target, replace_if=replace_if, error=error)
    try:
        with folder._sentences():
            yield folder.path
    except BaseException:
        folder.discard()
        raise
    folder.publish()


def _machine() -> str:
    """Returns host name and the first digits of what Linux draws at each start; elsewhere the host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return socket.gethostname()
    return f"{socket.gethostname()}-{boot.replace('-', '')[:_BOOT_DIGITS]}"


def _process_namespace() -> int:
    """Returns what processes share that see each other by their numbers; 0 where the system does not say."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; a number that this system does not have
        return True
    return True
