"""`CheckpointManager`: atomic, verified, self-pruning checkpoints of a sharded state dict.

A save goes into `step_XXXXXXXX.tmp`; the manifest with every file's checksum is written last, and rank 0 then renames
the folder. So a folder without `.tmp` is complete, whatever happened. Older checkpoints are deleted only afterwards;
one that cannot be deleted is a warning, since the run is safe by then, and is tried again at the next save. Links are
loaded, but neither they nor what they point to are deleted. A failure on one rank becomes the same `CheckpointError` on
all of them: nobody waits for a rank that gave up.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ove.checkpoint.in_process_writer import InProcessSaveStrategy
from megatron_ove.checkpoint.manifest import (
    PARTIAL_SUFFIX,
    checkpoint_name,
    checksum_problem,
    data_files,
    discard,
    file_crc32,
    is_taken,
    list_checkpoints,
    list_discarded,
    read_manifest,
    set_aside,
    structural_problem,
    sync_folder,
    write_manifest,
)
from megatron_ove.checkpoint.trust import require_data
from megatron_ove.config.upgrade import CONFIG_VERSION, upgrade_config, version_of
from megatron_ove.errors import CheckpointError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Beyond the tensors: zip headers per tensor, the index, the common part.
_OVERHEAD_BYTES = 4 << 20
_OVERHEAD_BYTES_PER_TENSOR = 4096


class CheckpointManager:
    """Saves, finds, verifies and loads the checkpoints of one run; every method is collective over all ranks."""

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int,
        verify: Literal["full", "sizes"],
        data_group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            directory: folder that holds the checkpoint folders; on a file system that all ranks see.
            keep: newest checkpoints kept; step 0 does not count and is never deleted.
            verify: what `latest` checks: every checksum, or file names and sizes only.
            data_group: ranks with equal parameters, which share the writing; None = every rank of the run.
        """
        self.directory = Path(directory)
        self.last_save_s = 0.0
        self._keep = keep
        self._verify = verify
        self._is_writer = dist.get_rank() == 0
        self._strategy = FullyParallelSaveStrategyWrapper(InProcessSaveStrategy(), data_group)

    def save(
        self,
        step: int,
        state: ShardedStateDict,
        *,
        files: Mapping[str, bytes] | None = None,
        manifest_extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes `state` as the checkpoint of `step` and deletes older ones.

        Args:
            step: optimizer steps done.
            state: sharded state dict; its plain values must be equal on all ranks.
            files: further files, relative path -> content; those of rank 0 are written.
            manifest_extra: JSON values for the manifest.

        Returns:
            The folder.

        Raises:
            CheckpointError: on all ranks, when it could not be written; earlier checkpoints are as they were.
        """
        started = time.monotonic()
        final = self.directory / checkpoint_name(step)
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        try:
            self._on_writer(lambda: _make_empty_folder(partial))
            sharded, common = cast(tuple[ShardedStateDict, StateDict], save_preprocess(state))
            files = files if files and self._is_writer else {}
            self._require_space(step, sharded, num_further_bytes=sum(map(len, files.values())))
            self._on_writer(lambda: TorchCommonSaveStrategy("torch", 1).save_common(common, str(partial)))
            self._together(lambda: self._strategy.save(sharded, partial))
            self._on_writer(lambda: save_config(CheckpointingConfig("torch_dist", 1), str(partial)))
            self._on_writer(lambda: _write_files(partial, files))
            checksums = self._share_files(data_files(partial), lambda name: _describe_file(partial / name))
            self._on_writer(lambda: write_manifest(partial, step=step, files=checksums, extra=manifest_extra or {}))
            self._on_writer(lambda: _publish(partial, final))
        except CheckpointError as error:
            if self._is_writer:
                shutil.rmtree(partial, ignore_errors=True)
            dist.barrier()
            raise CheckpointError(
                f"cannot save the checkpoint of step {step} to {self.directory}: {error}; earlier checkpoints are "
                "untouched, so start the same command again when this is repaired",
                on_every_rank=True,
            ) from error
        self._on_writer(lambda: self._prune(step))
        self.last_save_s = time.monotonic() - started
        return final

    def latest(self) -> Path | None:
        """Returns the newest usable checkpoint, logging one sentence for every newer one that is skipped.

        Returns:
            Its folder; None when nothing was ever completed.

        Raises:
            CheckpointError: there are finished checkpoints and none can be used. Starting from step 0 would then
                silently throw a run away.
        """
        path, skipped = self.first_usable(lambda: [path for _, path in list_checkpoints(self.directory)])
        if self._is_writer:
            for other, problem in skipped:
                logger.warning("Skipping checkpoint %s: %s; looking for an older one.", other, problem)
        broken = [f"{other.name}: {problem}" for other, problem in skipped if other.suffix != PARTIAL_SUFFIX]
        if path is None and broken:
            raise CheckpointError(
                f"none of the {len(broken)} checkpoints in {self.directory} can be used ({'; '.join(broken)}), and "
                "starting again from step 0 would lose the run; repair the folder, or move it away to start anew",
                on_every_rank=True,
            )
        return path

    def first_usable(self, candidates: Callable[[], Sequence[Path]]) -> tuple[Path | None, list[tuple[Path, str]]]:
        """Looks for a checkpoint that is complete and, with `verify: full`, intact.

        Args:
            candidates: called on rank 0 alone; returns the folders in question, best first.

        Returns:
            The first usable one, or None; and those before it, each with a clause that says what is wrong.
        """
        found = self._from_writer(lambda: [(path, structural_problem(path)) for path in candidates()])
        skipped = []
        for path, problem in found:
            problem = problem or (self._checksum_problem(path) if self._verify == "full" else None)
            if problem is None:
                return path, skipped
            skipped.append((path, problem))
        return None, skipped

    def first_problem(self, problem: str | None) -> str | None:
        """Returns what the first of the ranks that see a problem says of it, on all of them."""
        return next((text for text in _gather(problem) if text), None)

    def load(self, path: Path, state: ShardedStateDict) -> StateDict:
        """Fills `state` from a checkpoint; the layout of the run that wrote it does not matter.

        Raises:
            CheckpointError: on all ranks, when a tensor is missing or has another shape, or something would be run.
        """
        try:
            self._on_writer(lambda: require_data(path))
            return cast(StateDict, self._together(lambda: dist_checkpointing.load(state, str(path))))
        except CheckpointError as error:
            raise CheckpointError(
                f"cannot load the checkpoint {path}: {error}; use the configuration it was saved with, or another "
                "run_dir to start anew",
                on_every_rank=True,
            ) from error

    def _require_space(self, step: int, sharded: ShardedStateDict, *, num_further_bytes: int) -> None:
        tensors = [
            item
            for item in nested_values(sharded)
            if isinstance(item, ShardedTensor) and is_main_replica(item.replica_id)
        ]
        local = sum(item.data.numel() * item.data.element_size() for item in tensors if item.data is not None)
        per_rank = _gather((local + num_further_bytes, len(tensors)))
        needed = sum(size + _OVERHEAD_BYTES_PER_TENSOR * count for size, count in per_rank) + _OVERHEAD_BYTES
        free = self._from_writer(lambda: shutil.disk_usage(self.directory).free)
        if free < needed:
            raise CheckpointError(
                f"it needs about {needed / 2**20:.1f} MiB and the disk has {free / 2**20:.1f} MiB left; free some "
                "space or lower checkpoint.keep"
            )

    def _checksum_problem(self, path: Path) -> str | None:
        files = self._from_writer(lambda: read_manifest(path)["files"])
        problems = self._share_files(list(files), lambda name: checksum_problem(path, name, files[name]))
        return next((problem for _, problem in sorted(problems.items()) if problem), None)

    def _share_files(self, names: list[str], action: Callable[[str], T]) -> dict[str, T]:
        """Runs `action` once for every file, spread over the ranks; returns all results on all ranks."""
        names = _gather(names)[0]
        mine = names[dist.get_rank() :: dist.get_world_size()]
        parts = _gather(self._together(lambda: {name: action(name) for name in mine}))
        return {name: result for part in parts for name, result in part.items()}

    def _prune(self, newest_step: int) -> None:
        """Deletes what is not kept, but no links. Steps beyond `newest_step` are damaged ones that `latest` skipped:
        counted among the kept ones they would push out the checkpoint that was just written, so they are left alone."""
        with _warned_of(self.directory):
            folders = list_checkpoints(self.directory)
            finished = [
                path for step, path in folders if 0 < step <= newest_step and not path.name.endswith(PARTIAL_SUFFIX)
            ]
            unfinished = [path for _, path in folders if path.name.endswith(PARTIAL_SUFFIX)]
            for path in finished[self._keep :] + unfinished + list_discarded(self.directory):
                with _warned_of(path):
                    discard(path)

    def _on_writer(self, action: Callable[[], object]) -> None:
        self._together(lambda: action() if self._is_writer else None)

    def _from_writer(self, action: Callable[[], T]) -> T:
        result = self._together(lambda: action() if self._is_writer else None)
        return cast(T, _gather(result)[0])

    def _together(self, action: Callable[[], T]) -> T:
        """Runs `action` on this rank; if it failed on any rank, raises the same CheckpointError on all."""
        result: Any = None
        problem = None
        try:
            result = action()
        except (OSError, CheckpointError, CheckpointingException, CheckpointException, KeyError, RuntimeError) as error:
            logger.debug("A checkpoint operation failed", exc_info=True)
            problem = _clause(error)
        problem = self.first_problem(problem)
        if problem is not None:
            raise CheckpointError(problem)
        return result


def _clause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return _clause(next(iter(error.failures.values()))[0])
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some space or lower checkpoint.keep"
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error.strerror or error)
    text = str(error.args[0]) if error.args else type(error).__name__
    # How torch's zip writer reports a failed write; the system's own reason is lost in it.
    if any(sign in text for sign in ("iostream error", "PytorchStreamWriter failed writing file", "unexpected pos")):
        return "the disk refused a write, most likely because it is full; free some space or lower checkpoint.keep"
    return text.splitlines()[0]


def _gather(value: T) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _describe_file(path: Path) -> tuple[int, int]:
    return path.stat().st_size, file_crc32(path)


@contextlib.contextmanager
def _warned_of(path: Path) -> Iterator[None]:
    """Around deletions that nothing depends on: one that fails is a sentence in the log."""
    try:
        yield
    except OSError as error:
        logger.warning(
            "Cannot delete %s, which is not needed any more (%s); the run goes on, and the next save tries again.",
            path,
            _clause(error),
        )


def _make_empty_folder(path: Path) -> None:
    old = set_aside(path) if is_taken(path) else None
    path.mkdir(parents=True)
    if old is not None:
        _discard_old(old)


def _write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes and syncs each file anew: one linked to an older checkpoint's would share its damage."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(path.parent)


def _publish(partial: Path, final: Path) -> None:
    """Gives a complete folder its final name. What had it, e.g. a damaged one that `latest` skipped, goes last."""
    old = set_aside(final) if is_taken(final) else None
    partial.rename(final)
    sync_folder(final.parent)
    if old is not None:
        _discard_old(old)


def _discard_old(old: Path) -> None:
    with _warned_of(old):
        discard(old)
    if old.is_symlink():
        logger.warning("%s is a link that stood in the way of this save; it and what it points to are left alone.", old)


def read_common_state(path: str | Path) -> dict[str, Any]:
    """Returns the plain values of a checkpoint (step, config, ...) without loading a tensor; not collective. The
    configuration is upgraded to the present form."""
    file = Path(path) / "common.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        version = version_of(state["config"])
        state["config"] = upgrade_config(state["config"], version)
    except Exception as error:  # unpickling changed bytes can raise anything
        raise CheckpointError(
            f"cannot read {file} ({_clause(error)}), so {path} is not a checkpoint of this program or is damaged; "
            "name a folder like runs/NAME/checkpoints/step_00000100"
        ) from error
    if version > CONFIG_VERSION:
        raise CheckpointError(
            f"{path} was written by a later version of this program (its configuration has version {version}, and "
            f"{CONFIG_VERSION} is the latest known here); use that version"
        )
    return state
