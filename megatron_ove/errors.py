"""Errors a user can cause. Each message is one plain sentence: the fact with its values, why, and what to do.

The command line prints only the message of these and exits with status 2; anything else is a defect of ours and keeps
its traceback.
"""

from __future__ import annotations

import errno


class MegatronOveError(Exception):
    """Base of every error that is explained to the user instead of being shown as a traceback.

    Attributes:
        on_every_rank: whether all ranks of a machine raise it together, so that one of them needs to print it.
    """

    def __init__(self, message: str, *, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank


def file_system_sentence(error: OSError) -> str | None:
    """Returns the sentence for an error that a user's disk, path or permission causes; None for any other.

    The places that expect such an error say more; this is for the command lines, so that none of them is a traceback.
    """
    advice = _FILE_SYSTEM_ADVICE.get(error.errno or 0)
    if advice is None:
        return None
    where = str(error.filename) if error.filename is not None else "a file"
    return f"{where} cannot be used ({error.strerror}); {advice}"


_FREE_SPACE, _PATH = "free some space or use another disk", "check the path"
_FILE_SYSTEM_ADVICE = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder where you may write",
    errno.ENOENT: _PATH,
    errno.ENOTDIR: _PATH,
    errno.EISDIR: _PATH,
    errno.EEXIST: _PATH,
    errno.ELOOP: _PATH,
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: _FREE_SPACE,
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class ConfigError(MegatronOveError, ValueError):
    """A configuration, or a configuration together with the world size, that cannot be run."""


class DataError(MegatronOveError, ValueError):
    """A data set, shard, index or record that cannot be used."""


class CheckpointError(MegatronOveError, RuntimeError):
    """A checkpoint that cannot be written, read, or does not fit the model."""


class TrainingError(MegatronOveError, RuntimeError):
    """A run that cannot go on, e.g. because its loss stays infinite."""
