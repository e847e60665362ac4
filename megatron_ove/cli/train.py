"""`megatron-ove train CONFIG`: trains, or continues the run that is in the configuration's run_dir."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Trains; returns the exit status."""
    from megatron_ove.config.loader import dump_config, load_config
    from megatron_ove.errors import ConfigError, MegatronOveError

    if arguments.nproc < 1:
        raise ConfigError(f"--nproc {arguments.nproc} starts no process; give at least 1")
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(arguments.config, arguments.overrides)
    except MegatronOveError as error:
        error.on_every_rank = True
        raise
    if arguments.nproc > 1 and "RANK" not in os.environ:
        return _start_processes(arguments)
    text = dump_config(config)
    if is_main:
        sys.stdout.write(text)
        sys.stdout.flush()
        _open_run_dir(Path(config.run_dir))

    from megatron_ove.parallel.topology import destroy_topology, initialize_topology
    from megatron_ove.training.trainer import Trainer

    topology = initialize_topology(config.parallel, seed=config.seed)
    trainer = Trainer(config, topology)
    if is_main:  # only now, so that a command that cannot continue the run leaves the run's own configuration alone
        (Path(config.run_dir) / "config.resolved.yaml").write_text(text, encoding="utf-8")
    trainer.run()
    destroy_topology()
    return 0


def _open_run_dir(run_dir: Path) -> None:
    """Makes the run folder and starts console.log."""
    from megatron_ove.errors import ConfigError

    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)  # now rather than after the first hours
        handler = logging.FileHandler(run_dir / "console.log", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run_dir = {run_dir} cannot be written ({error.strerror}: {error.filename}), so the run could keep "
            "nothing; choose a folder where you may write"
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


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
