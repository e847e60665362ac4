"""Class-center heads side by side: ours in every mode, the published method, the softmax over all classes.

Each contender runs in processes of its own and does whole optimizer steps: draws, softmax, gradients of the embeddings,
clipping, update. Contenders take turns, and medians are compared. `head_traffic.py` says how bytes are counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from head_contenders import OTHERS, OURS, Workload, head_config, optim_config
from head_report import describe_machine, describe_setting, expected_rows, plot, spread, summarize, table
from head_rounds import ALLOCATORS, Schedule, measure

from megatron_ove.config.yaml_file import parse_yaml
from megatron_ove.errors import ConfigError
from megatron_ove.preprocess.tool_arguments import report, run_tool, whole_number
from megatron_ove.whole_file import write_whole

_ALL = (*OURS, *OTHERS)
_COMPARED = ("default", "per_label", "grouped", "shared", "published", "full_softmax")
_SWEPT = {"classes": [10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000], "batch": [16, 32, 64, 128, 256, 512]}


def _parser() -> argparse.ArgumentParser:
    work, schedule = Workload(20_000), Schedule()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, at_least_1 = parser.add_argument, whole_number(1)
    add("--num-classes", type=whole_number(2), default=work.num_classes, help="of all ranks together")
    add("--embedding-size", type=at_least_1, default=work.embedding_size, help="width of embeddings and centers")
    add("--batch-size", type=at_least_1, default=work.batch_size, help="samples of a microbatch, over all ranks")
    add("--labels", type=at_least_1, default=work.stored_labels, help="stored labels of a sample")
    add("--labels-per-step", type=at_least_1, default=work.labels_per_step, help="of those, drawn in each step")
    add("--microbatches", type=at_least_1, default=work.microbatches, help="of an optimizer step")
    add(
        "--sample-rate", type=_share, default=work.sample_rate, help="share of classes in a set (default mode: its own)"
    )
    add("--active-rows", type=at_least_1, help="fix the classes in the union of the sets to about this many")
    add("--label-distribution", choices=["uniform", "zipf"], default=work.label_distribution, help="of class ids")
    add("--head", action="append", default=[], metavar="KEY=VALUE", help="option of our heads; may be repeated")
    add("--optim", action="append", default=[], metavar="KEY=VALUE", help="option of our center optimizer; the same")
    add("--contenders", nargs="+", choices=_ALL, default=None, metavar="NAME", help=f"of {', '.join(_ALL)}")
    add("--device", choices=["cpu", "cuda"], default=schedule.device, help="where to run")
    add("--threads", type=at_least_1, default=schedule.threads, help="of each rank, on the CPU")
    add("--ranks", type=at_least_1, default=schedule.ranks, help="processes (gloo) that share the classes")
    add("--steps", type=at_least_1, default=schedule.steps, help="timed steps of a turn")
    add("--repeats", type=at_least_1, default=schedule.rounds, help="turns of each contender")
    add("--warmup", type=whole_number(0), default=schedule.warmup, help="steps before the first turn, not timed")
    add("--allocator", choices=sorted(ALLOCATORS), default=schedule.allocator, help="freed memory on the CPU, for all")
    add("--sweep", nargs="+", choices=sorted(_SWEPT), default=[], help="also vary this; the others stay as given")
    add("--sweep-values", nargs="+", type=at_least_1, help="values of a single sweep")
    add("--json", type=Path, help="write all figures to this file")
    add("--plot", type=Path, help="draw the sweeps (both when none is named) into this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_tool(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    work, schedule, names = _read(options)
    report(describe_setting(work, schedule))
    summary = summarize(measure(names, work, schedule))
    report(table(summary))
    reference = summary.get("default", {})
    result: dict[str, Any] = {
        "ratio_time_vs_published": reference.get("ratio_time_vs_published"),
        "ratio_memory_vs_published": reference.get("ratio_memory_vs_published"),
        "ratio_bytes_vs_published": reference.get("ratio_bytes_vs_published"),
        "contenders": summary,
        "work": asdict(work),
        "schedule": asdict(schedule),
        "expected_active_rows": expected_rows(names, work),
        "sweeps": {},
    }
    for kind in _sweeps(options):
        result["sweeps"][kind] = points = _sweep(kind, options.sweep_values or _SWEPT[kind], names, work, schedule)
        for name, ratio in spread(points).items():
            report(f"{name}: largest time / smallest over {kind}: {ratio:.2f}")
    result["machine"] = describe_machine()
    if options.json is not None:
        write_whole(options.json, json.dumps(result, indent=2).encode())
    if options.plot is not None:
        plot(result["sweeps"], options.plot, "What is not varied: " + describe_setting(work, schedule))


def _sweep(kind: str, values: list[int], names: list[str], work: Workload, schedule: Schedule) -> list[dict[str, Any]]:
    points = []
    for value in sorted(values):
        changed = replace(work, **{"num_classes" if kind == "classes" else "batch_size": value})
        report(f"\n{kind} = {value:,}")
        summary = summarize(measure(names, changed, schedule))
        report(table(summary))
        points.append({"value": value, "contenders": summary})
    return points


def _sweeps(options: argparse.Namespace) -> list[str]:
    return options.sweep or (list(_SWEPT) if options.plot is not None else [])


def _read(options: argparse.Namespace) -> tuple[Workload, Schedule, list[str]]:
    names = list(dict.fromkeys(options.contenders or _COMPARED))
    if options.ranks > 1 and options.contenders is None:
        names.remove("full_softmax")
    work = Workload(
        num_classes=options.num_classes,
        embedding_size=options.embedding_size,
        batch_size=options.batch_size,
        stored_labels=options.labels,
        labels_per_step=options.labels_per_step,
        microbatches=options.microbatches,
        sample_rate=options.sample_rate,
        active_rows=options.active_rows,
        label_distribution=options.label_distribution,
        head_options=_pairs(options.head, "--head"),
        optim_options=_pairs(options.optim, "--optim"),
    )
    schedule = Schedule(
        device=options.device,
        threads=options.threads,
        ranks=options.ranks,
        steps=options.steps,
        rounds=options.repeats,
        warmup=options.warmup,
        allocator=options.allocator,
    )
    _check(options, names)
    for name in names:
        if name in OURS:
            head_config(name, work), optim_config(name, work)
    return work, schedule, names


def _check(options: argparse.Namespace, names: list[str]) -> None:
    if options.labels < options.labels_per_step and set(names) & set(OTHERS):
        raise ConfigError(
            f"--labels {options.labels} is less than --labels-per-step {options.labels_per_step}, and the published "
            "head needs a label in every slot; raise --labels or lower --labels-per-step"
        )
    batches = [options.batch_size, *(_SWEPT["batch"] if "batch" in _sweeps(options) else [])]
    uneven = [size for size in batches if size % options.ranks]
    if uneven:
        raise ConfigError(
            f"a batch of {uneven[0]} samples does not divide evenly over --ranks {options.ranks}, as the published "
            "head's gather needs; choose another --batch-size"
        )
    if options.ranks > 1 and "full_softmax" in names:
        raise ConfigError(
            f"the contender full_softmax holds all classes in one process, but --ranks is {options.ranks}; leave it "
            "out of --contenders or use --ranks 1"
        )
    if options.ranks > 1 and options.device == "cuda":
        raise ConfigError(
            f"--ranks {options.ranks} needs as many GPUs, and the benchmark uses one; use --ranks 1 or --device cpu"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu")
    if options.sweep_values and len(_sweeps(options)) != 1:
        raise ConfigError("--sweep-values needs exactly one --sweep, classes or batch, to know what they are values of")


def _pairs(texts: list[str], flag: str) -> dict[str, Any]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{flag} {text} has no '=', so it sets nothing; write {flag} KEY=VALUE")
        pairs[key] = parse_yaml(value, flag)
    return pairs


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0 and at most 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
