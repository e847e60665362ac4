"""What a slow disk costs: the project's own loader with made-up latency in every read, and the read path alone.

A set of JPEGs is written once. Loaders with one reading thread and with several then deliver the same steps in turns,
with and without latency, and their batches must be equal to the bit. Latency is a pause inside the read call, during
which other threads run, as they do while a network disk answers. Before that the members of the set are read without
decoding, once one after the other and once by the pool.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from head_report import describe_machine
from torch import Tensor

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.build import build_loader
from megatron_ove.data.read_ahead import ReadAhead
from megatron_ove.data.sample_reader import SampleReader
from megatron_ove.data.step_loader import StepLoader
from megatron_ove.data.synthetic import write_synthetic_shard_set
from megatron_ove.parallel.topology import ParallelTopology, destroy_topology, initialize_topology
from megatron_ove.preprocess.tool_arguments import report, run_tool, whole_number
from megatron_ove.shards.files import ShardFiles
from megatron_ove.shards.format import PICTURE_MEMBER
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.whole_file import write_whole


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, at_least_1 = parser.add_argument, whole_number(1)
    add("--latency-ms", type=whole_number(0), default=5, help="of each read")
    add("--readers", type=whole_number(2), default=16, help="reading threads")
    add("--threads", type=at_least_1, default=2, help="decoding threads")
    add("--samples", type=whole_number(8), default=512, help="pictures of the set")
    add("--side", type=whole_number(28), default=256, help="of the pictures, in pixels")
    add("--batch", type=at_least_1, default=128, help="pictures of a step")
    add("--steps", type=at_least_1, default=8, help="timed steps of a turn")
    add("--repeats", type=at_least_1, default=3, help="turns of each loader")
    add("--json", type=Path, help="write all figures to this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_tool(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    topology = initialize_topology(ParallelConfig(device="cpu"), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "images"
        size = (options.side, options.side)
        write_synthetic_shard_set(shards, kind="image", num_samples=options.samples, picture_size=size)
        latency = options.latency_ms / 1000
        reading = _measure_reading(shards, latency, options.readers)
        loading = _measure_loading(shards, topology, options, latency)
    destroy_topology()
    document = {
        "read_path_speedup": reading["one after the other"] / reading["pool"],
        "share_of_rate_without_latency": _rate(loading, options.readers, latency) / _rate(loading, options.readers, 0),
        "several_readers_vs_one_without_latency": _rate(loading, options.readers, 0) / _rate(loading, 1, 0),
        "read_seconds": reading,
        "samples_per_s": {
            f"{readers} readers, {1000 * pause:g} ms": rates for (readers, pause), rates in loading.items()
        },
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "machine": describe_machine(),
    }
    report("| loader | samples/s | least - most |\n|---|---|---|")
    for name, rates in document["samples_per_s"].items():
        report(f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f} - {max(rates):.0f} |")
    report(
        f"reading alone: {document['read_path_speedup']:.1f} times as fast as one read after the other; loading with "
        f"{options.latency_ms} ms a read: {document['share_of_rate_without_latency']:.2f} of the rate without; all "
        "batches equal to the bit"
    )
    if options.json is not None:
        write_whole(options.json, json.dumps(document, indent=2).encode())


def _slow(latency: float) -> Callable[[int, int, int], bytes]:
    def pread(handle: int, size: int, offset: int) -> bytes:
        time.sleep(latency)
        return os.pread(handle, size, offset)

    return pread if latency else os.pread


def _measure_reading(directory: Path, latency: float, readers: int) -> dict[str, float]:
    """Returns the seconds in which every picture is read."""
    shards = ShardSet.open(directory)
    shards.files.pread = _slow(latency)  # type: ignore[method-assign]
    started = time.perf_counter()
    one_by_one = [shards.read(row, PICTURE_MEMBER) for row in range(len(shards))]
    seconds = {"one after the other": time.perf_counter() - started}
    pool = ReadAhead([shards], readers)
    started = time.perf_counter()
    read = pool.start((0, row, PICTURE_MEMBER) for row in range(len(shards))).reader_of(0)
    at_once = [read(row, PICTURE_MEMBER) for row in range(len(shards))]
    seconds["pool"] = time.perf_counter() - started
    pool.close()
    if at_once != one_by_one:
        raise RuntimeError("the two ways of reading returned other bytes")
    return seconds


def _measure_loading(
    directory: Path, topology: ParallelTopology, options: argparse.Namespace, latency: float
) -> dict[tuple[int, float], list[float]]:
    """Returns (readers, latency) -> samples per second of each turn."""
    rates: dict[tuple[int, float], list[float]] = {}
    digests = set()
    for turn in range(1 + options.repeats):  # the first one warms up the machine
        for readers in (1, options.readers):
            for pause in (0.0, latency):
                config = _configuration(directory, options, readers)
                with mock.patch.object(ShardFiles, "pread", staticmethod(_slow(pause))):
                    rate, digest = _load(_start(config, topology), options)
                digests.add(digest)
                if turn:
                    rates.setdefault((readers, pause), []).append(rate)
    if len(digests) > 1:
        raise RuntimeError("the loaders delivered other batches")
    return rates


def _start(config: TrainConfig, topology: ParallelTopology) -> StepLoader:
    def collate(samples: Samples, pack: PatchPack, reader: SampleReader) -> dict[str, Tensor]:
        return {name: reader.labels(samples, name) for name in samples.source_names}

    return build_loader(config, topology, start_step=0, collate=collate)


def _load(loader: StepLoader, options: argparse.Namespace) -> tuple[float, str]:
    """Returns samples per second, after two steps that are not timed, and a digest of all batches."""
    try:
        steps = [loader.load_step(0).batches, loader.load_step(1).batches]
        started = time.perf_counter()
        steps += [loader.load_step(2 + step).batches for step in range(options.steps)]
        seconds = time.perf_counter() - started
    finally:
        loader.close()
    return options.steps * options.batch / seconds, _digest([batch for batches in steps for batch in batches])


def _configuration(directory: Path, options: argparse.Namespace, readers: int) -> TrainConfig:
    return config_from_dict(
        {
            "name": "loading",
            "run_dir": str(directory.parent / "run"),
            "encoder": {"hidden_size": 64, "num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 64},
            "objectives": {
                "concepts": {"kind": "partial_fc", "source": "images", "num_classes": 8, "sample_rate": 1.0}
            },
            "data": {
                "tokens_per_microbatch": 16384,
                "num_threads": options.threads,
                "read_threads": readers,
                "sources": {"images": {"kind": "image", "path": str(directory), "image_size": 224}},
            },
            "train": {"num_steps": 1 << 30, "global_batch_size": options.batch},
        },
        "the benchmark",
    )


def _rate(loading: Mapping[tuple[int, float], list[float]], readers: int, latency: float) -> float:
    return statistics.median(loading[readers, latency])


def _digest(batches: list[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        pack = batch.main
        tensors: list[Any] = [
            pack.patches,
            pack.positions,
            pack.cu_seqlens,
            batch.samples.seed,
            *batch.inputs.values(),
        ]
        for tensor in tensors:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
