"""Errors a user can cause. Each message is one plain sentence: the fact with its values, why, and what to do.

The command line prints only the message of these and exits with status 2; anything else is a defect of ours and keeps
its traceback.
"""

from __future__ import annotations


class MegatronOveError(Exception):
    """Base of every error that is explained to the user instead of being shown as a traceback.

    Attributes:
        on_every_rank: whether all ranks raise it together, so that rank 0 alone needs to print it.
    """

    on_every_rank: bool = False


class ConfigError(MegatronOveError, ValueError):
    """A configuration, or a configuration together with the world size, that cannot be run."""


class DataError(MegatronOveError, ValueError):
    """A data set, shard, index or record that cannot be used."""


class CheckpointError(MegatronOveError, RuntimeError):
    """A checkpoint that cannot be written, read, or does not fit the model."""


class TrainingError(MegatronOveError, RuntimeError):
    """A run that cannot go on, e.g. because its loss stays infinite."""
