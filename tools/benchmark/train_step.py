"""One joint optimizer step of three heads: ours, with one packed forward, against the published loop's shape.

Both get the same samples (random pixels and labels; pictures, pages and clips as 16 : 8 : 16, scaled down) and the
same encoder; pooled embeddings must agree before anything is timed. `published_loop.py` says what the published step
does: four dense forwards with eager attention, heads in fp32 with dense gradients and a dense AdamW. Ours is the
package's own `TrainStep` with its default heads. Decoding, cutting into patches (ours) and normalising pixels (theirs)
are not timed; gathering the chosen patches of dense clips is part of the published step. Each runs in a process of its
own; they take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encoder_contenders import SIZES
from head_report import describe_machine
from torch import Tensor
from train_step_contenders import build_contender
from train_step_work import SOURCES, Workload
from turns import add_schedule_arguments, schedule_of, take_turns

from megatron_ove.config.yaml_file import parse_yaml
from megatron_ove.errors import ConfigError
from megatron_ove.preprocess.tool_arguments import report, run_tool, whole_number
from megatron_ove.whole_file import write_whole

CONTENDERS = ("ours", "published")
# Largest difference / largest element of the pooled embeddings.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}


def _parser() -> argparse.ArgumentParser:
    work = Workload()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, at_least_1 = parser.add_argument, whole_number(1)
    add("--size", choices=SIZES, default=work.size, help="of the encoder")
    add("--layers", type=at_least_1, help="number of layers, if not the size's own")
    for name, what in zip(SOURCES, ("pictures", "pages", "clips"), strict=True):
        add(f"--{what}", type=at_least_1, default=work.samples[name], help=f"{what} of the step")
        add(f"--{name}-classes", type=whole_number(20), default=work.classes[name], help=f"classes of the {what}")
    add("--picture-side", type=whole_number(14), default=work.picture_side, help="of pictures and pages, in pixels")
    add("--frame-side", type=whole_number(14), default=work.frame_side, help="of the frames of clips, in pixels")
    add("--kept-frames", type=whole_number(1, 64), default=work.kept_frames, help="frames of a clip that are encoded")
    add("--precision", choices=sorted(TOLERANCE), default=work.precision, help="of the encoder")
    add("--head", action="append", default=[], metavar="KEY=VALUE", help="option of our heads; may be repeated")
    add_schedule_arguments(parser)
    add("--json", type=Path, help="write all figures to this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_tool(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    schedule = schedule_of(options)
    if 64 % options.kept_frames:
        raise ConfigError(
            f"--kept-frames {options.kept_frames} does not divide the 64 frames of a clip, of which one is drawn from "
            "each of as many equal parts; use 1, 2, 4, 8, 16, 32 or 64"
        )
    work = Workload(
        size=options.size,
        num_layers=options.layers,
        samples=dict(zip(SOURCES, (options.pictures, options.pages, options.clips), strict=True)),
        classes={name: getattr(options, f"{name}_classes") for name in SOURCES},
        picture_side=options.picture_side,
        frame_side=options.frame_side,
        kept_frames=options.kept_frames,
        precision=options.precision,
        device=options.device,
    )
    heads = _pairs(options.head)
    builders = {name: (build_contender, (name, work, heads)) for name in CONTENDERS}
    results = take_turns(builders, schedule, lambda outputs: _check_agreement(outputs, TOLERANCE[work.precision]))
    summary = {name: result.summary() for name, result in results.items()}
    ours, published = (summary[name] for name in CONTENDERS)
    report(_table(summary))
    document = {
        "ratio_time_vs_published": published["seconds"] / ours["seconds"],
        "ratio_memory_vs_published": ours["peak_memory_bytes"] / max(1, published["peak_memory_bytes"]),
        "contenders": summary,
        "work": asdict(work),
        "heads": heads,
        "schedule": asdict(schedule),
        "machine": describe_machine(),
    }
    report(
        f"ours: {document['ratio_time_vs_published']:.2f} times as fast, "
        f"{document['ratio_memory_vs_published']:.2f} of the memory"
    )
    if options.json is not None:
        write_whole(options.json, json.dumps(document, indent=2).encode())


def _check_agreement(outputs: Mapping[str, dict[str, Tensor]], tolerance: float) -> None:
    ours, published = (outputs[name]["pooled"] for name in CONTENDERS)
    difference = float((ours - published).abs().max() / published.abs().max())
    if not difference <= tolerance:
        raise RuntimeError(f"the pooled embeddings of the two differ by {difference:.2g} of the largest element")


def _table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    parts = [name for name in summary["ours"]["parts"] if any(figures["parts"][name] for figures in summary.values())]
    lines = [
        f"| contender | ms | least - most | peak GB | {' | '.join(parts)} |",
        "|" + "---|" * (4 + len(parts)),
    ]
    for name, figures in summary.items():
        least, most = figures["seconds_least"], figures["seconds_most"]
        lines.append(
            f"| {name} | {1000 * figures['seconds']:,.0f} | {1000 * least:,.0f} - {1000 * most:,.0f} "
            f"| {figures['peak_memory_bytes'] / 1e9:.2f} | "
            + " | ".join(f"{1000 * figures['parts'][part]:,.0f}" for part in parts)
            + " |"
        )
    return "\n".join(lines)


def _pairs(texts: list[str]) -> dict[str, Any]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--head {text} has no '=', so it sets nothing; write --head KEY=VALUE")
        pairs[key] = parse_yaml(value, "--head")
    return pairs


if __name__ == "__main__":
    sys.exit(main())
