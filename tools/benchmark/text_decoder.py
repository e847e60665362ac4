"""Encoder, bridge and text decoder against plain PyTorch and transformers, and the loss over the vocabulary by itself.

`reading`: forward and backward of pictures with texts, ours packed, and what a user would write instead: the exported
encoder on a dense batch, a linear map, and transformers' decoder on texts filled up to the longest. Both have the same
weights and must agree in loss and gradients before anything is timed.

`loss`: cross entropy of answer rows over a whole vocabulary, ours in chunks, and with the logits of these rows. Each
runs in a process of its own; memory is the peak beyond weights, rows and their gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from encoder_contenders import SIZES
from head_report import describe_machine
from text_decoder_contenders import LossContender, LossWork, OurReader, PlainReader, Reading
from torch import Tensor
from turns import add_schedule_arguments, schedule_of, take_turns

from megatron_ove.preprocess.tool_arguments import report, run_tool, whole_number
from megatron_ove.whole_file import write_whole

TOLERANCE = 1e-3


def _parser() -> argparse.ArgumentParser:
    reading, loss = Reading(), LossWork()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, at_least_1 = parser.add_argument, whole_number(1)
    add("--parts", nargs="+", choices=["reading", "loss"], default=["reading", "loss"], help="what to measure")
    add("--size", choices=SIZES, default=reading.size, help="of the encoder")
    add("--encoder-layers", type=at_least_1, default=reading.encoder_layers, help="layers of the encoder")
    add("--resolution", type=whole_number(14), default=reading.resolution, help="side of the pictures in pixels")
    add("--pictures", type=at_least_1, default=reading.pictures, help="each with a text")
    add("--hidden", type=whole_number(64), default=reading.hidden, help="width of the decoder, a multiple of 64")
    add("--decoder-layers", type=at_least_1, default=reading.decoder_layers, help="layers of the decoder")
    add("--vocabulary", type=at_least_1, default=reading.vocabulary, help="tokens of the decoder")
    add("--rows", type=at_least_1, default=loss.rows, help="answer rows of `loss`")
    add("--loss-hidden", type=at_least_1, default=loss.hidden, help="width of `loss`")
    add("--loss-vocabulary", type=at_least_1, default=loss.vocabulary, help="tokens of `loss`")
    add_schedule_arguments(parser)
    add("--json", type=Path, help="write all figures to this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_tool(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    schedule, document = schedule_of(options), {"machine": describe_machine()}
    if "reading" in options.parts:
        work = Reading(
            options.size,
            options.encoder_layers,
            options.resolution,
            options.pictures,
            options.hidden,
            options.decoder_layers,
            options.vocabulary,
        )
        results = take_turns(
            {"ours": (OurReader, (work,)), "plain": (PlainReader, (work,))}, schedule, _check_agreement
        )
        ratios = sorted(a / b for a, b in zip(results["ours"].seconds, results["plain"].seconds, strict=True))
        document["reading"] = {
            "time_of_plain": statistics.median(ratios),
            "least_and_most": [ratios[0], ratios[-1]],
            "work": asdict(work),
            "contenders": {name: result.summary() for name, result in results.items()},
        }
        report(
            f"reading: ours takes {statistics.median(ratios):.3f} of the plain time "
            f"({ratios[0]:.3f} - {ratios[-1]:.3f}); "
            f"{results['ours'].peak_bytes / 1e9:.2f} GB, {results['plain'].peak_bytes / 1e9:.2f} GB"
        )
    if "loss" in options.parts:
        loss = LossWork(options.rows, options.loss_hidden, options.loss_vocabulary)
        builders = {name: (LossContender, (loss, name == "chunks")) for name in ("chunks", "logits")}
        results = take_turns(builders, schedule, lambda outputs: _check_agreement(outputs, "chunks", "logits"))
        beyond = {name: result.peak_bytes - loss.kept_bytes for name, result in results.items()}
        document["loss"] = {
            "part_of_memory_of_logits": beyond["chunks"] / max(1, beyond["logits"]),
            "bytes_beyond_weights_and_gradients": beyond,
            "time_of_logits": statistics.median(results["chunks"].seconds)
            / statistics.median(results["logits"].seconds),
            "work": asdict(loss),
            "contenders": {name: result.summary() for name, result in results.items()},
        }
        report(
            f"loss: in chunks {beyond['chunks'] / 1e6:,.0f} MB beyond weights, rows and gradients, with all logits "
            f"{beyond['logits'] / 1e6:,.0f} MB ({document['loss']['part_of_memory_of_logits']:.3f}); time "
            f"{document['loss']['time_of_logits']:.2f} of that"
        )
    if options.json is not None:
        write_whole(options.json, json.dumps(document, indent=2).encode())


def _check_agreement(outputs: Mapping[str, dict[str, Tensor]], ours: str = "ours", other: str = "plain") -> None:
    for name, expected in outputs[other].items():
        difference = float((outputs[ours][name] - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{ours} and {other} differ in {name} by {difference:.2g} of its largest element")


if __name__ == "__main__":
    sys.exit(main())
