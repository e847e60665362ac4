"""Which class-center head teaches most: trains small encoders under each variant and compares held-out figures.

    python tools/benchmark/head_ablation.py --data synthetic --classes 20000 --seeds 5 --steps 1000 \\
        --json runs.json --markdown head_ablation.md --plot head_ablation.png

Runs of one seed share data, batches, labels and the encoder's initial weights, so differences are paired. A finished
run is written to the JSON file at once and not repeated: an interrupted series goes on, several calls (other data,
other classes) add to one file, and table and plot show everything in it. `--no-runs` only draws them again. Variants,
`ablation_heads.VARIANTS`, say what they change in the package's defaults; a run made with other defaults is repeated.
Batch sizes are compared at an equal number of samples: `--samples 24576 --batch-size 16 64 256 1024`. The commands
behind the published tables: docs/ablation/README.md.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from ablation_axes import axes_path, draw_axes
from ablation_data import AblationData, make_data
from ablation_encoders import INITIAL_RANGE
from ablation_heads import DEFAULT, VARIANTS, settings_of
from ablation_report import draw_plot, write_markdown
from ablation_runs import SAMPLES, TIME, Run, RunFile, RunKey, median_seconds
from ablation_training import PRETRAINING_SAMPLES, RunSize, as_record, train

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.parallel.topology import ParallelTopology, destroy_topology, initialize_topology

_data_of = lru_cache(maxsize=1)(make_data)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(VARIANTS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", default=list(VARIANTS), help=names)
    parser.add_argument(
        "--equal-time",
        nargs="*",
        choices=VARIANTS,
        metavar="NAME",
        default=[],
        help="variants that are also trained for the time which the default needs",
    )
    parser.add_argument("--data", choices=["synthetic", "photos", "digits", "words"], default="synthetic")
    parser.add_argument("--classes", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N - 1")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=1_000)
    length.add_argument("--samples", type=int, metavar="N", help="train on so many samples, whatever the batch size")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128], metavar="N")
    parser.add_argument(
        "--initializer-range",
        type=float,
        nargs="+",
        metavar="STD",
        help=f"of the encoder's fresh weights; only of words (default: {INITIAL_RANGE})",
    )
    parser.add_argument(
        "--pretrained",
        action="store_true",
        help="start from an encoder that has learned to read as many other words; only of words",
    )
    parser.add_argument("--json", type=Path, default=Path("head_ablation.json"), metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--no-runs", action="store_true", help="only write table and plot from the JSON file")
    options = parser.parse_args(arguments)
    if options.data != "words" and (options.pretrained or options.initializer_range):
        parser.error(f"--pretrained and --initializer-range are of --data words, not of {options.data}")
    uneven = [size for size in options.batch_size if options.samples and options.samples % size]
    if uneven:
        parser.error(f"--samples {options.samples} is no multiple of the batch size {uneven[0]}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Runs what is missing, then writes table and plot."""
    options = parse(arguments)
    file = RunFile(options.json)
    if not options.no_runs:
        topology = initialize_topology(ParallelConfig(), seed=0)
        try:
            for variant, key in planned_runs(options):
                run_once(variant, key, file, topology)
        finally:
            destroy_topology()
    if options.markdown:
        write_markdown(options.markdown, file.runs, options.plot)
    if options.plot:
        draw_plot(options.plot, file.runs)
        draw_axes(axes_path(options.plot), file.runs)
    return 0


def planned_runs(options: argparse.Namespace) -> Iterator[tuple[str, RunKey]]:
    """Yields all runs at equal samples, seed by seed, then those at equal time, which need the others' times."""
    ranges = options.initializer_range or [INITIAL_RANGE if options.data == "words" else None]
    pretrained = PRETRAINING_SAMPLES if options.pretrained else 0
    for budget, variants in ((SAMPLES, options.variants), (TIME, options.equal_time)):
        for seed in range(options.seeds):  # outermost: data and a pretrained encoder are made once
            for initializer_range in ranges:
                for batch_size in options.batch_size:
                    steps = options.samples // batch_size if options.samples else options.steps
                    key = RunKey(
                        options.data, options.classes, seed, batch_size, steps, budget, initializer_range, pretrained
                    )
                    yield from ((variant, key) for variant in variants)


def run_once(variant: str, key: RunKey, file: RunFile, topology: ParallelTopology) -> None:
    """Does a run unless the file has it; prints one line."""
    settings = settings_of(variant, key.classes)
    run = file.find(key, settings)
    if run is None:
        steps = key.base_steps if key.budget == SAMPLES else steps_at_equal_time(variant, key, file.runs)
        data: AblationData = _data_of(key.data, key.classes, key.seed)
        size = RunSize(steps, key.batch_size, key.seed, key.initializer_range, key.pretrained_samples)
        points, mean_cosine = train(variant, data, size, topology)
        run = Run(key, variant, steps, settings, as_record(points), _environment(), mean_cosine)
        file.add(run)
    figures = " ".join(f"{name} {value:.4f}" for name, value in run.points[-1]["figures"].items())
    print(
        f"{key.data} {key.classes} {key.budget} seed {key.seed} {variant:10} {run.steps} steps of {key.batch_size} "
        f"{run.seconds:.0f} s: {figures}",
        flush=True,
    )


def steps_at_equal_time(variant: str, key: RunKey, runs: Sequence[Run]) -> int:
    """Returns the steps that a variant does in the time of the default's run at equal samples; medians over seeds."""
    seconds = {
        name: median_seconds(
            run for run in runs if run.key.budget == SAMPLES and run.key.series == key.series and run.has(settings)
        )
        for name in (DEFAULT, variant)
        for settings in [settings_of(name, key.classes)]
    }
    return max(1, round(key.base_steps * seconds[DEFAULT] / seconds[variant]))


def _environment() -> dict[str, str | int]:
    return {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
