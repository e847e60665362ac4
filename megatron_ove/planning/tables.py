"""A plan as text for a terminal: tables with units, and sentences."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ove.planning.alternatives import Knob
from megatron_ove.planning.memory import COMPONENTS
from megatron_ove.planning.plan import Plan

_GIB = 2**30


def print_plan(plan: Plan, knobs: list[Knob], console: Console) -> None:
    """Prints sizes, memory, messages, time, and what to do about memory."""
    for line in (*_headline(plan), ""):
        console.print(Text(line), soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_traffic_table(plan))
    console.print(_time_table(plan))
    for line in (*_verdict(plan, knobs), *_totals(plan)):
        console.print(Text(line), soft_wrap=True)


def print_layouts(plans: list[Plan], console: Console, *, most: int = 12) -> None:
    """Prints the fastest layouts."""
    if not plans:
        console.print("No layout of these ranks fits; see the settings above, or use more ranks.")
        return
    # tensor x pipeline (chunks, layers of the last stage) x data, a replica's microbatches; short, to fit 80 columns
    columns = ("TP", "PP", "VPP", "last", "DP", "n", "step s", "samples/s", "MFU", "bubble", "GiB")
    table = Table(
        title=f"Layouts that fit, fastest first ({min(most, len(plans))} of {len(plans)})", title_justify="left"
    )
    for name in columns:
        table.add_column(name, justify="right")
    for plan in plans[:most]:
        layout = plan.layout
        rate = plan.config.train.global_batch_size / plan.time.total
        grid = (layout.tensor, layout.pipeline, layout.chunks, layout.stage_layers[-1], layout.data)
        shares = (f"{plan.mfu:.1%}", f"{plan.bubble_share:.1%}", f"{plan.fullest.memory.total / _GIB:.1f}")
        sizes = (*grid, plan.workload.num_microbatches)
        table.add_row(*map(str, sizes), f"{plan.time.total:.3f}", f"{rate:,.0f}", *shares)
    console.print(table)


def _headline(plan: Plan) -> list[str]:
    layout, workload, config = plan.layout, plan.workload, plan.config
    encoder, centers = plan.num_parameters
    chunks = f", {layout.chunks} chunks a rank" if layout.chunks > 1 else ""
    if len(set(layout.stage_layers)) > 1:
        chunks += f", stages of {', '.join(map(str, layout.stage_layers))} layers"
    return [
        f"{config.name}: {layout.world_size} x {plan.device.name} = tensor {layout.tensor} x pipeline "
        f"{layout.pipeline} x data {layout.data}{chunks}; {config.train.precision}, recompute: "
        f"{config.encoder.recompute}",
        f"Encoder {encoder / 1e6:,.1f} M parameters, class centers {centers / 1e6:,.1f} M.",
        f"A step: {config.train.global_batch_size:,} samples in {workload.num_microbatches} microbatches of "
        f"{workload.tokens_per_microbatch:,} patches for each of {layout.data} replicas, "
        f"{workload.padding_share:.1%} of them padding; every sample counts at its largest size.",
        f"Device: {plan.device.source}.",
    ]


def _memory_table(plan: Plan) -> Table:
    table = Table(title="Memory of the first rank of each stage, GiB", title_justify="left")
    table.add_column("")
    for one in plan.ranks:
        table.add_column(f"rank {one.rank}, {one.num_layers} layers", justify="right")
    for name in COMPONENTS:
        values = [one.memory.by_component()[name] for one in plan.ranks]
        table.add_row(name.replace("_", " "), *(f"{value / _GIB:.2f}" for value in values))
    table.add_section()
    table.add_row("total", *(f"{one.memory.total / _GIB:.2f}" for one in plan.ranks))
    table.add_row("usable", *(f"{plan.device.usable / _GIB:.2f}" for _ in plan.ranks))
    table.add_row("microbatches in flight", *(str(sum(one.memory.in_flight)) for one in plan.ranks))
    return table


def _traffic_table(plan: Plan) -> Table:
    table = Table(title="Messages of a step, busiest rank", title_justify="left")
    for name in ("group", "ranks", "operation", "messages", "MiB", "over"):
        table.add_column(name, justify="left" if name in ("group", "operation", "over") else "right")
    busiest: dict[tuple[str, str], tuple[int, int]] = {}
    for one in plan.ranks:
        for message in one.traffic:
            key = message.group, message.operation
            busiest[key] = max(busiest.get(key, (0, 0)), (message.num_bytes, message.count))
    for (group, operation), (num_bytes, count) in sorted(busiest.items()):
        link = "network" if plan.layout.spans_nodes(group) else "node"
        size = plan.layout.group_size(group)
        table.add_row(group, str(size), operation.replace("_", "-"), str(count), f"{num_bytes / 2**20:,.3f}", link)
    return table


def _time_table(plan: Plan) -> Table:
    table = Table(title="Estimated time of a step", title_justify="left")
    for name in ("part", "ms", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, seconds in vars(plan.time).items():
        label = f"messages: {name}" if name in ("tensor", "pipeline", "data", "other") else name
        table.add_row(label, f"{1000 * seconds:,.1f}", f"{seconds / plan.time.total:.1%}")
    table.add_section()
    table.add_row("total", f"{1000 * plan.time.total:,.1f}", "")
    return table


def _verdict(plan: Plan, knobs: list[Knob]) -> list[str]:
    fullest, usable = plan.fullest, plan.device.usable
    needed = f"{fullest.memory.total / _GIB:.1f} GiB of {usable / _GIB:.1f} GiB usable"
    if plan.fits:
        lines = [f"It fits: rank {fullest.rank} needs most, {needed}."]
    else:
        name, size = max(fullest.memory.by_component().items(), key=lambda item: item[1])
        lines = [
            f"It does not fit: rank {fullest.rank} (stage {fullest.stage}) runs out of memory, it needs {needed}; the "
            f"largest part is {name.replace('_', ' ')} with {size / _GIB:.1f} GiB."
        ]
    for knob in knobs[:3]:
        end = "" if plan.fits else ", which fits" if knob.plan.fits else ", which still does not fit"
        slower = knob.plan.time.total / plan.time.total - 1
        lines.append(f"  {knob.change} -> {knob.memory / _GIB:.1f} GiB, step time {slower:+.0%}{end}")
    return lines


def _totals(plan: Plan) -> list[str]:
    train = plan.config.train
    rate = train.global_batch_size / plan.time.total
    unit = "GPU" if plan.device.is_gpu else "process"
    return [
        f"Step {plan.time.total:.3f} s, {rate:,.0f} samples/s, MFU {plan.mfu:.1%}, bubble {plan.bubble_share:.1%}, "
        f"{sum(plan.operations.values()) / 1e12:,.0f} Tflop.",
        f"Whole run: {train.num_steps:,} steps, {plan.num_samples:,} samples, {plan.days:,.1f} days, "
        f"{plan.device_hours:,.0f} {unit}-hours.",
        "Memory and messages are counted; times are estimated from data-sheet rates and assumed shares of them.",
    ]
