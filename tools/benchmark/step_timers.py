"""What the phase times in the metrics cost: the quick start's steps with and without them, turn by turn in one run.

    torchrun --nproc_per_node 2 tools/benchmark/step_timers.py

Data is synthetic and of the quick start's sizes. Without the timers nothing is timed, watched or marked. Since steps of
a CPU scatter by more than the timers cost, the marks of a step are counted and priced too.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ove.config.loader import load_config
from megatron_ove.data.synthetic import write_synthetic_shard_set
from megatron_ove.parallel.topology import destroy_topology, initialize_topology
from megatron_ove.training.step_timers import StepTimers
from megatron_ove.training.trainer import Trainer

_RECIPE = Path(__file__).parents[2] / "examples/quickstart/config.yaml"
_SHAPES: dict[str, dict[str, Any]] = {
    "images": {"kind": "image", "picture_size": (112, 112), "num_classes": 64},
    "pages": {"kind": "ocr", "picture_size": (224, 224), "num_classes": 400, "label_width": 32},
    "clips": {"kind": "video", "grid_height": 8, "grid_width": 8, "selected_patches": 256, "num_classes": 60},
}
_WARM_UP = 4


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of each kind (default 40)")
    num_steps = 2 * parser.parse_args().steps + _WARM_UP
    recipe = load_config(_RECIPE)
    topology = initialize_topology(recipe.parallel, seed=recipe.seed)
    shared = [tempfile.mkdtemp(prefix="step-timers-") if topology.global_rank == 0 else ""]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    if topology.global_rank == 0:
        for name, shape in _SHAPES.items():
            write_synthetic_shard_set(folder / name, num_samples=64, **shape)
    dist.barrier()
    overrides = [f"data.sources.{name}.path={folder}/{name}" for name in _SHAPES]
    overrides += [f"run_dir={folder}/run", "tracking.tensorboard=false"]
    trainer = Trainer(load_config(_RECIPE, overrides), topology)
    with ExitStack() as cleanup:
        cleanup.callback(trainer.loader.close)
        cleanup.callback(trainer.reporter.close)
        seconds, marks = _measure(trainer, num_steps)
    if topology.global_rank == 0:
        timed, plain = (statistics.median(seconds[kind]) for kind in (True, False))
        print(
            f"median step with the timers {1e3 * timed:.2f} ms, without {1e3 * plain:.2f} ms: {timed / plain - 1:+.2%}"
        )
        price = _price_of_mark()
        print(f"{marks:.0f} marks a step at {1e6 * price:.2f} us: {marks * price / plain:.3%} of a step")
        shutil.rmtree(folder)
    dist.barrier()
    destroy_topology()


def _measure(trainer: Trainer, num_steps: int) -> tuple[dict[bool, list[float]], float]:
    """Returns whether timed -> seconds of each step, and the marks that a timed step sets on this rank."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    charge, marks = trainer.timers._clock.charge, [0]

    def counted(phase: str) -> None:
        marks[0] += 1
        charge(phase)

    for step in range(num_steps):
        is_timed = step % 2 == 0
        for chunk in trainer.chunks:
            chunk.config.timers = trainer.timers if is_timed else None
        if step == num_steps - 2:
            trainer.timers._clock.charge = counted  # type: ignore[method-assign]
        dist.barrier()
        started = time.perf_counter()
        with ExitStack() as stack:
            if is_timed:
                stack.enter_context(trainer.timers.watch_communication())
                stack.enter_context(trainer.timers.step(step + 1))
            trainer._one_step(1e-3, wants_stop=False)
        dist.barrier()
        if _WARM_UP <= step < num_steps - 2:
            seconds[is_timed].append(time.perf_counter() - started)
    return seconds, float(marks[0])


def _price_of_mark(calls: int = 100_000) -> float:
    """Returns the seconds of entering or leaving a phase."""
    timers = StepTimers(torch.device("cpu"))
    with timers.step(1):
        started = time.perf_counter()
        for _ in range(calls):
            timers.enter("communication")
            timers.leave("communication")
        return (time.perf_counter() - started) / (2 * calls)


if __name__ == "__main__":
    main()
