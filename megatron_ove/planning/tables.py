"""A plan as text for a terminal: tables with units, and sentences."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ove.config.train import TrainConfig
from megatron_ove.planning.alternatives import Knob
from megatron_ove.planning.memory import COMPONENTS
from megatron_ove.planning.plan import Plan
from megatron_ove.planning.units import device_time, duration, number, operations, parameters

_MIB, _GIB = 2**20, 2**30


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
        shares = (f"{plan.mfu:.1%}", f"{plan.bubble_share:.1%}", number(plan.fullest.memory.total / _GIB))
        sizes = (*grid, plan.workload.num_microbatches)
        table.add_row(*map(str, sizes), number(plan.time.total), number(rate), *shares)
    console.print(table)


def _headline(plan: Plan) -> list[str]:
    layout, workload, config = plan.layout, plan.workload, plan.config
    encoder, centers = map(parameters, plan.num_parameters)
    chunks = f", {layout.chunks} chunks a rank" if layout.chunks > 1 else ""
    if len(set(layout.stage_layers)) > 1:
        chunks += f", stages of {', '.join(map(str, layout.stage_layers))} layers"
    return [
        f"{config.name}: {layout.world_size} x {plan.device.name} = tensor {layout.tensor} x pipeline "
        f"{layout.pipeline} x data {layout.data}{chunks}; {config.train.precision}, recompute: "
        f"{getattr(config.encoder, 'recompute', 'none')}",
        f"Encoder {encoder} parameters, class centers {centers}.",
        f"A step: {config.train.global_batch_size:,} samples in {workload.num_microbatches} microbatches of "
        f"{workload.tokens_per_microbatch:,} patches for each of {layout.data} replicas, "
        f"{workload.padding_share:.1%} of them padding{_texts(config)}.",
        *_samples(plan),
        f"Device: {plan.device.source}.",
    ]


def _texts(config: TrainConfig) -> str:
    """Says how much text a microbatch has room for."""
    room = config.data.text_tokens_per_microbatch
    return f", and room for {room:,} text tokens in each" if room else ""


def _samples(plan: Plan) -> list[str]:
    """Says which sizes of samples were used."""
    stored, missing = plan.stored_patches, plan.samples.missing if plan.samples else {}
    if not stored:
        return ["Every sample counts at its largest size, since there is no shard set to look at."]
    means = ", ".join(f"{name} {number(mean)} patches on average" for name, mean in stored.items())
    lines = [f"For time and messages samples count as they are stored ({means}), for memory at their largest size."]
    return lines + [f"Samples of {name} count at their largest size: {reason}." for name, reason in missing.items()]


def _memory_table(plan: Plan) -> Table:
    unit, name = (_GIB, "GiB") if plan.fullest.memory.total >= _GIB else (_MIB, "MiB")
    table = Table(title=f"Memory of the first rank of each stage, {name}", title_justify="left")
    table.add_column("")
    for one in plan.ranks:
        table.add_column(f"rank {one.rank}, {one.num_layers} layers", justify="right")
    for component in COMPONENTS:
        values = [one.memory.by_component()[component] for one in plan.ranks]
        table.add_row(component.replace("_", " "), *(f"{value / unit:,.2f}" for value in values))
    table.add_section()
    table.add_row("total", *(f"{one.memory.total / unit:,.2f}" for one in plan.ranks))
    table.add_row("usable", *(f"{plan.device.usable / unit:,.2f}" for _ in plan.ranks))
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
        table.add_row(label, number(1000 * seconds), f"{seconds / plan.time.total:.1%}")
    table.add_section()
    table.add_row("total", number(1000 * plan.time.total), "")
    return table


def _verdict(plan: Plan, knobs: list[Knob]) -> list[str]:
    fullest, usable = plan.fullest, plan.device.usable
    needed = f"{_size(fullest.memory.total)} of {_size(usable)} usable"
    if plan.fits:
        lines = [f"It fits: rank {fullest.rank} needs most, {needed}."]
    else:
        name, size = max(fullest.memory.by_component().items(), key=lambda item: item[1])
        lines = [
            f"It does not fit: rank {fullest.rank} (stage {fullest.stage}) runs out of memory, it needs {needed}; the "
            f"largest part is {name.replace('_', ' ')} with {_size(size)}."
        ]
    for knob in knobs[:3]:
        end = "" if plan.fits else ", which fits" if knob.plan.fits else ", which still does not fit"
        slower = knob.plan.time.total / plan.time.total - 1
        lines.append(f"  {knob.change} -> {_size(knob.memory)}, step time {slower:+.0%}{end}")
    return lines


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{number(num_bytes / _MIB)} MiB"


def _totals(plan: Plan) -> list[str]:
    train = plan.config.train
    rate = train.global_batch_size / plan.time.total
    unit = "GPU" if plan.device.is_gpu else "process"
    whole, devices = duration(plan.seconds), device_time(plan.seconds * plan.layout.world_size)
    return [
        f"Step {' '.join(duration(plan.time.total))}, {number(rate)} samples/s, MFU {plan.mfu:.1%}, bubble "
        f"{plan.bubble_share:.1%}, {operations(sum(plan.operations.values()))}.",
        f"Whole run: {train.num_steps:,} steps, {plan.num_samples:,} samples, {' '.join(whole)}, "
        f"{devices[0]} {unit}-{devices[1]}.",
        "Memory and messages are counted; times are estimated from data-sheet rates and assumed shares of them.",
    ]
