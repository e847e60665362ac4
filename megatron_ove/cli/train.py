"""`megatron-ove train CONFIG`: trains, or continues the run that is in the configuration's run_dir."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megatron_ove.config.train import TrainConfig
    from megatron_ove.training.run_lock import RunLock

logger = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "train",
        help="train, or continue a run",
        description="Trains, or continues from the newest checkpoint in the run folder. Stop with Ctrl-C, SIGTERM, "
        "SIGUSR1 or a file named 'stop' in the run folder; the same command continues.",
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a setting, e.g. --set train.num_steps=100; may be repeated",
    )
    parser.add_argument(
        "--nproc", type=int, default=1, metavar="N", help="start N processes on this machine (default 1)"
    )
    parser.add_argument(
        "--profile",
        metavar="START:COUNT",
        help="record COUNT steps from step START on (the first step is 1) into the run folder's profile/",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the configuration, its shard sets, and that nobody trains in the run folder; print that folder, "
        "and start nothing",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Trains; returns the exit status."""
    from megatron_ove.config.loader import dump_config, load_config
    from megatron_ove.errors import ConfigError, MegatronOveError
    from megatron_ove.training.done_marker import is_done

    if arguments.nproc < 1:
        raise ConfigError(f"--nproc {arguments.nproc} starts no process; give at least 1")
    if arguments.nproc > 1 and "RANK" in os.environ:
        raise ConfigError(
            f"--nproc {arguments.nproc} starts processes on this machine, but a launcher (torchrun, srun) has started "
            "this one as one of its ranks already; leave --nproc away",
            on_every_rank=True,
        )
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        arguments.overrides += _profile_overrides(arguments.profile)
        config = load_config(arguments.config, arguments.overrides)
        if arguments.check:
            return _check(config, arguments.config)
        config = _with_class_counts(config, arguments.config)
    except MegatronOveError as error:
        error.on_every_rank = True
        raise
    run_dir, text = Path(config.run_dir), dump_config(config)
    if is_done(run_dir, num_steps=config.train.num_steps, config_text=text):
        logger.info("All %d steps are done. Raise train.num_steps to train on.", config.train.num_steps)
        return 0
    if arguments.nproc > 1:
        return _start_processes(arguments)
    if not is_main:
        return _train(config, text, lock=None)
    with _open_run_dir(run_dir) as lock:
        sys.stdout.write(text)
        sys.stdout.flush()
        return _train(config, text, lock=lock)


def _with_class_counts(config: TrainConfig, name: str) -> TrainConfig:
    """Fills in numbers of classes; a finished run may have outlived the shard sets that they came from."""
    from megatron_ove.config.loader import dump_config
    from megatron_ove.data.class_counts import fill_in_class_counts, fill_in_from_run
    from megatron_ove.errors import DataError
    from megatron_ove.training.done_marker import is_done

    try:
        return fill_in_class_counts(config, name)
    except DataError:
        earlier = fill_in_from_run(config, name)
        if earlier is None or not is_done(
            Path(config.run_dir), num_steps=config.train.num_steps, config_text=dump_config(earlier)
        ):
            raise
        return earlier


def _check(config: TrainConfig, name: str) -> int:
    """Looks at everything that a start would look at before it trains, and prints the run folder.

    Raises:
        ConfigError: something is wrong; all of it, one sentence a line.
    """
    from megatron_ove.data.class_counts import fill_in_class_counts
    from megatron_ove.data.shard_fit import find_doubts, open_held_out_sets, open_shard_sets
    from megatron_ove.errors import ConfigError, MegatronOveError
    from megatron_ove.training.run_lock import require_unlocked

    problems: list[str] = []
    try:
        shard_sets = open_shard_sets(config)
        config = fill_in_class_counts(config, name)
        for sentence in find_doubts(config, shard_sets, counts_samples=True):
            logger.warning("%s", sentence)
    except MegatronOveError as error:
        problems.append(str(error))
    try:
        open_held_out_sets(config)
    except MegatronOveError as error:
        problems.append(str(error))
    problems += [
        f"init_from = {start.path} does not exist; name a run folder, a checkpoint or a HuggingFace folder"
        for start in config.starts
        if not Path(start.path).exists()
    ]
    try:
        require_unlocked(Path(config.run_dir))
    except MegatronOveError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    sys.stdout.write(f"{config.run_dir}\n")
    return 0


def _train(config: TrainConfig, text: str, *, lock: RunLock | None) -> int:
    """Trains on this rank; `lock` is the main rank's."""
    from megatron_ove.parallel.topology import destroy_topology, initialize_topology
    from megatron_ove.training.cpu_memory import prepare_cpu_memory
    from megatron_ove.training.done_marker import mark_done, unmark_done
    from megatron_ove.training.trainer import Trainer

    run_dir, is_main = Path(config.run_dir), lock is not None
    topology = initialize_topology(config.parallel, seed=config.seed)
    if topology.device.type == "cpu":
        prepare_cpu_memory()
    trainer = Trainer(config, topology, peak_rate=_peak_rate(config, topology.device), lock=lock)
    if is_main:  # only now, so that a command that cannot continue the run leaves the run's own configuration alone
        (run_dir / "config.resolved.yaml").write_text(text, encoding="utf-8")
        unmark_done(run_dir)
    state = trainer.run()
    if is_main and state.step >= config.train.num_steps:
        mark_done(run_dir, step=state.step, config_text=text)
    destroy_topology()
    return 0


def _profile_overrides(window: str | None) -> list[str]:
    from megatron_ove.errors import ConfigError

    if window is None:
        return []
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", window)
    if match is None:
        raise ConfigError(
            f"--profile {window} is not of the form START:COUNT with two whole numbers of at least 1, so no window of "
            "steps can be read from it; write for instance 10:3 for steps 10, 11 and 12"
        )
    return [f"profile.start_step={match[1]}", f"profile.num_steps={match[2]}"]


def _peak_rate(config: TrainConfig, device: torch.device) -> float | None:
    """Returns the operations per second that MFU is a share of; None where they are not known."""
    import torch

    from megatron_ove.planning.devices import device_of_torch

    known = device_of_torch(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.rate("fp8" if config.encoder.is_fp8 else config.train.precision) if known else None


def _open_run_dir(run_dir: Path) -> RunLock:
    """Makes the run folder and locks it; then starts console.log and removes an earlier launch's stop file."""
    from megatron_ove.errors import ConfigError
    from megatron_ove.training.run_lock import RunLock
    from megatron_ove.training.stop_signal import clear_stop_file

    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)  # now rather than after the first hours
        lock = RunLock(run_dir)
        handler = logging.FileHandler(run_dir / "console.log", encoding="utf-8")
        clear_stop_file(run_dir)
    except OSError as error:
        raise ConfigError(
            f"run_dir = {run_dir} cannot be written ({error.strerror}: {error.filename}), so the run could keep "
            "nothing; choose a folder where you may write"
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    return lock


def _start_processes(arguments: argparse.Namespace) -> int:
    """Runs the same command on `--nproc` processes under torch's launcher; returns the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the ranks themselves say what went wrong
    command = ["--standalone", f"--nproc-per-node={arguments.nproc}", "-m", "megatron_ove", "train", arguments.config]
    for override in arguments.overrides:
        command += ["--set", override]
    try:
        launch(command)
    except ChildFailedError as error:
        return max(1, next(iter(error.failures.values())).exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0
