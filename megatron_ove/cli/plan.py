"""`megatron-ove plan CONFIG --world-size N --gpu NAME`: memory, messages and time of a run, before it is bought."""

from __future__ import annotations

import argparse
from pathlib import Path

_MOST_RANKS = 1_000_000


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "plan",
        help="say what a run needs: memory, communication, time",
        description="Computes from the configuration what each rank holds and sends and how long a step takes. "
        "Needs no GPU and no data, and allocates nothing; where the shard sets are there, their index says how large "
        "samples are.",
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks: GPUs, or processes on a CPU")
    parser.add_argument(
        "--gpu", default="h100-80g", metavar="NAME", help="a100-80g, h100-80g (default), h200-141g, b200 or cpu"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--suggest", action="store_true", help="also rank all layouts that fit by estimated step time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the memory of each stage (png, svg, pdf)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan; returns 0, or 2 where it does not fit."""
    from megatron_ove.config.loader import load_config
    from megatron_ove.data.class_counts import fill_in_class_counts
    from megatron_ove.errors import ConfigError

    if arguments.world_size < 1:
        raise ConfigError(f"--world-size {arguments.world_size} is no number of ranks; give at least 1")
    if arguments.world_size > _MOST_RANKS:
        raise ConfigError(
            f"--world-size {arguments.world_size} is more ranks than any machine has, and planning them would not end; "
            f"give at most {_MOST_RANKS}"
        )
    config = fill_in_class_counts(load_config(arguments.config, arguments.overrides), arguments.config)

    from rich.console import Console

    from megatron_ove.planning.alternatives import rank_knobs, suggest_layouts
    from megatron_ove.planning.devices import find_device
    from megatron_ove.planning.plan import make_plan
    from megatron_ove.planning.stored_samples import look_at_samples
    from megatron_ove.planning.tables import print_layouts, print_plan

    device = find_device(arguments.gpu, world_size=arguments.world_size)
    samples = look_at_samples(config)
    plan = make_plan(config, world_size=arguments.world_size, device=device, samples=samples)
    console = Console()
    print_plan(plan, rank_knobs(plan), console)
    layouts = None
    if arguments.suggest:
        layouts = suggest_layouts(config, world_size=arguments.world_size, device=device, samples=samples)
        print_layouts(layouts, console)
    if arguments.json:
        import json

        content = plan.to_dict() | ({} if layouts is None else {"layouts": [one.to_dict() for one in layouts]})
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        from megatron_ove.planning.picture import draw_plan

        draw_plan(plan, arguments.picture)
    return 0 if plan.fits else 2
