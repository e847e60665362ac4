"""The encoder alone, forward and backward: ours against a plain PyTorch ViT with eager attention, and one with sdpa.

Ours is what trains on one rank: megatron-core layers, all pictures in one pack. The plain encoders (`plain_vit.py`)
take the same pictures as a dense batch. All have the same weights, and outputs and gradients must agree before anything
is timed. Each runs in a process of its own; they take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encoder_contenders import SIZES, Workload, build_contender
from encoder_parts import measure_parts
from head_report import describe_machine
from torch import Tensor
from turns import add_schedule_arguments, schedule_of, take_turns

from megatron_ove.preprocess.tool_arguments import report, run_tool, whole_number
from megatron_ove.whole_file import write_whole

CONTENDERS = ("ours", "eager", "sdpa")
LOOKED_INTO = ("ours", "sdpa")
# Largest difference / largest element. fp32: sums in another order over 32 layers; bf16: roundings add up over them.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


def _parser() -> argparse.ArgumentParser:
    work = Workload()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, at_least_1 = parser.add_argument, whole_number(1)
    add("--size", choices=SIZES, default=work.size, help="of the encoder")
    add("--layers", type=at_least_1, help="number of layers, if not the size's own")
    add("--resolution", type=whole_number(14), default=work.resolution, help="side of the pictures in pixels")
    add("--batch-size", type=at_least_1, default=work.batch_size, help="pictures")
    add("--dtype", choices=sorted(TOLERANCE), default=work.dtype, help="of weights and activations")
    add("--parts", action="store_true", help="also say where the time goes, in ours and in sdpa (CPU)")
    add_schedule_arguments(parser)
    add("--json", type=Path, help="write all figures to this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_tool(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    schedule = schedule_of(options)
    work = Workload(
        size=options.size,
        num_layers=options.layers,
        resolution=options.resolution,
        batch_size=options.batch_size,
        dtype=options.dtype,
        device=options.device,
    )
    builders = {name: (build_contender, (name, work)) for name in CONTENDERS}
    results = take_turns(
        builders,
        schedule,
        lambda outputs: _check_agreement(outputs, TOLERANCE[work.dtype]),
        measure_parts if options.parts else None,
    )
    summary = {name: result.summary() for name, result in results.items()}
    report(_table(summary))
    summary["eager"]["parts"] = {}
    for part in summary["ours"]["parts"]:
        report(f"{part}: " + ", ".join(f"{name} {1000 * summary[name]['parts'][part]:,.1f} ms" for name in LOOKED_INTO))
    if options.json is not None:
        document = {
            "times_faster_than": {name: _times_faster(summary, name) for name in CONTENDERS[1:]},
            "part_of_memory_of": {name: _part_of_memory(summary, name) for name in CONTENDERS[1:]},
            "contenders": summary,
            "work": asdict(work),
            "schedule": asdict(schedule),
            "machine": describe_machine(),
        }
        write_whole(options.json, json.dumps(document, indent=2).encode())


def _check_agreement(outputs: Mapping[str, dict[str, Tensor]], tolerance: float) -> None:
    ours = outputs["ours"]
    for other in CONTENDERS[1:]:
        for name, expected in outputs[other].items():
            difference = float((ours[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
            if not difference <= tolerance:
                raise RuntimeError(f"ours and {other} differ in {name} by {difference:.2g} of its largest element")


def _times_faster(summary: Mapping[str, Mapping[str, Any]], other: str) -> float:
    return summary[other]["seconds"] / summary["ours"]["seconds"]


def _part_of_memory(summary: Mapping[str, Mapping[str, Any]], other: str) -> float:
    return summary["ours"]["peak_memory_bytes"] / max(1, summary[other]["peak_memory_bytes"])


def _table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| contender | ms | least - most | peak GB | ours is faster by | ours takes of its memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in summary.items():
        least, most = figures["seconds_least"], figures["seconds_most"]
        lines.append(
            f"| {name} | {1000 * figures['seconds']:,.0f} | {1000 * least:,.0f} - {1000 * most:,.0f} "
            f"| {figures['peak_memory_bytes'] / 1e9:.2f} | {_times_faster(summary, name):.2f} "
            f"| {_part_of_memory(summary, name):.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
