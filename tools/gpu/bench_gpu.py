"""Measures a CUDA machine: speed, MFU and memory, FP8 against bf16, decoding, heads. Writes JSON and Markdown tables.

`--device cpu --tiny` runs the same code with toy sizes, and says of each part that needs a GPU why it did not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from gpu_measure import Section, describe_machine
from gpu_others import measure_decoding, measure_heads
from gpu_sections import Effort, compare_losses, find_crossover, measure_speed
from gpu_workloads import SIZES

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.parallel.topology import destroy_topology, initialize_topology
from megatron_ove.preprocess.tool_arguments import report, run_tool, whole_number
from megatron_ove.whole_file import write_whole

_SECTIONS = {
    "speed": measure_speed,
    "loss": compare_losses,
    "crossover": find_crossover,
    "decode": measure_decoding,
    "heads": measure_heads,
}


def _parser() -> argparse.ArgumentParser:
    effort = Effort()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="cuda", help="where to run")
    add("--tiny", action="store_true", help="toy sizes and few steps: whether everything runs, not how fast")
    add("--sections", nargs="+", choices=list(_SECTIONS), default=list(_SECTIONS), metavar="NAME", help="parts to run")
    add("--sizes", nargs="+", choices=list(SIZES), default=list(effort.sizes), metavar="SIZE", help="encoders to time")
    add("--steps", type=whole_number(1), default=effort.repeats, help="timed steps; medians are reported")
    add("--warmup", type=whole_number(0), default=effort.warmup, help="steps before them")
    add("--loss-steps", type=whole_number(1), default=effort.loss_steps, help="of the comparison of losses")
    add("--output", type=Path, default=Path("runs/gpu/bench"), help="where to write, without .json and .md")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_tool(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    effort = Effort(options.tiny, options.warmup, options.steps, options.loss_steps, options.sizes)
    if options.tiny:
        effort = Effort(tiny=True, warmup=1, repeats=1, loss_steps=20, sizes=options.sizes[:1])
    topology = initialize_topology(ParallelConfig(device=options.device), seed=0)
    try:
        result: dict[str, Any] = {"machine": describe_machine(topology.device), "effort": dataclasses.asdict(effort)}
        result["sections"] = {}
        for name in options.sections:
            section = _SECTIONS[name](topology, effort)
            result["sections"][name] = dataclasses.asdict(section)
            report(_section_text(section))
            # After every part, so that a crash in a later one costs nothing.
            _write(options.output, result)
    finally:
        destroy_topology()
    report(f"Written to {options.output}.json and {options.output}.md")


def _write(output: Path, result: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output.with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    write_whole(output.with_suffix(".md"), markdown(result).encode())


def markdown(result: dict[str, Any]) -> str:
    """Returns the whole result as Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if key != "packages")
    packages = ", ".join(f"{name} {version}" for name, version in result["machine"]["packages"].items())
    toy = "\n\nToy sizes: these figures say only that the code runs." if result["effort"]["tiny"] else ""
    sections = [_section_text(Section(**section)) for section in result["sections"].values()]
    return "\n\n".join([f"# GPU benchmark\n\n{machine}\n\n{packages}{toy}", *sections]) + "\n"


def _section_text(section: Section) -> str:
    parts = [f"## {section.title}", section.note]
    names = [name for name in (section.rows[0] if section.rows else {}) if name != "losses"]
    if section.rows:
        lines = [[_cell(name, row.get(name)) for name in names] for row in section.rows]
        heads = [name.replace("_", " ") for name in names]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(names), *lines]))
    if section.skipped:
        parts_of: dict[str, list[str]] = {}
        for what, why in section.skipped:
            parts_of.setdefault(why, []).append(what)
        parts.append("Not run here:\n\n" + "\n".join(f"- {'; '.join(names)}: {why}" for why, names in parts_of.items()))
    return "\n\n".join(part for part in parts if part)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if name in ("mfu", "difference_to_bf16"):
            return f"{100 * value:.2f} %"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    raise SystemExit(main())
