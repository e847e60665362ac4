"""`megatron-ove convert export|import`: between checkpoints and HuggingFace folders."""

from __future__ import annotations

import argparse
import sys

from megatron_ove.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "convert",
        help="between checkpoints and HuggingFace folders",
        description="Writes the encoder of a checkpoint as a HuggingFace folder, or the other way round.",
    )
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")

    export = directions.add_parser("export", help="checkpoint -> HuggingFace folder")
    export.add_argument("--checkpoint", required=True, help="folder like runs/NAME/checkpoints/step_00000100")
    export.add_argument("--output", required=True, help="new folder for the HuggingFace model")
    export.add_argument(
        "--class-centers", action="store_true", help="also write every head's class centers, one file a head"
    )
    export.add_argument(
        "--average", action="store_true", help="write the moving average of the weights (train.ema_decay)"
    )
    export.add_argument(
        "--reader",
        metavar="OBJECTIVE",
        help="write encoder, bridge and text decoder of this objective, to be run whole",
    )
    export.set_defaults(run=run_export)

    importing = directions.add_parser("import", help="HuggingFace folder -> checkpoint that initialises runs")
    importing.add_argument("--source", required=True, help="HuggingFace folder (config.json, *.safetensors)")
    importing.add_argument("--output", required=True, help="new checkpoint folder")
    importing.set_defaults(run=run_import)


def run_export(arguments: argparse.Namespace) -> int:
    """Exports and says how to load the result; returns the exit status."""
    from megatron_ove.convert.exchange import OneVisionExchange, exchange_of

    if arguments.reader:
        return _export_reader(arguments)
    exchange = exchange_of(arguments.checkpoint)
    path = exchange.export(
        arguments.checkpoint,
        arguments.output,
        with_class_centers=arguments.class_centers,
        averaged=arguments.average,
    )
    sys.stdout.write(f"{path}\n")
    if isinstance(exchange, OneVisionExchange):
        sys.stdout.write(f'load it with AutoModel.from_pretrained("{path}", trust_remote_code=True)\n')
    return 0


def _export_reader(arguments: argparse.Namespace) -> int:
    from megatron_ove.objectives.text_generation.reader import write_reader

    if arguments.class_centers:
        raise ConfigError(
            "--class-centers has no effect with --reader, whose folder holds no class centers; export twice"
        )
    path = write_reader(arguments.checkpoint, arguments.output, arguments.reader, averaged=arguments.average)
    sys.stdout.write(f'{path}\nload it with AutoModel.from_pretrained("{path}", trust_remote_code=True)\n')
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    """Imports and prints the checkpoint's path; returns the exit status."""
    from megatron_ove.convert.hf_import import import_pretrained

    path = import_pretrained(arguments.source, arguments.output)
    sys.stdout.write(f"{path}\n")
    return 0
