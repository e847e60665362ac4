"""A result folder that appears only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ove.errors import CheckpointError


@contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """Gives a temporary folder beside `directory` to fill; renames it to `directory` at the end.

    Raises:
        CheckpointError: `directory` exists and is not empty, or something cannot be written.
    """
    final = Path(directory)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(
            f"{final} exists already and would be overwritten; name another folder, or delete it first"
        )
    partial = final.with_name(final.name + ".tmp")
    try:
        if partial.exists():  # left by a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        if final.exists():
            final.rmdir()
        partial.rename(final)
    except OSError as error:
        raise CheckpointError(
            f"{final} cannot be written ({error.strerror or error}); check free space and permissions, then repeat"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
