"""The parts of the GPU benchmark around the encoder: decoding of pictures, and the class-center heads."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_measure import Section, median_seconds, release_memory
from gpu_sections import Effort

from megatron_ove.parallel.topology import ParallelTopology

_HEADS = Path(__file__).resolve().parents[1] / "benchmark/heads.py"
_NUM_CLASSES = 1_000_000


def measure_decoding(topology: ParallelTopology, effort: Effort) -> Section:
    """Decodes, cuts and resizes JPEGs with DALI, on the CPU and on the GPU."""
    side, count, target = (64, 8, 28) if effort.tiny else (640, 512, 448)
    section = Section(
        "DALI decoding",
        f"JPEGs of {side} x {side} px, decoded and resized to {target} x {target}, as the image source does it.",
    )
    try:
        from megatron_ove.data.picture_decoder import PictureDecoder
        from megatron_ove.data.synthetic import encode_jpeg
        from megatron_ove.data.windows import Windows
    except ImportError as error:
        section.skipped.append(("all", f"{error}; install nvidia-dali-cuda130"))
        return section
    generator = np.random.default_rng(0)
    smooth = generator.integers(0, 256, (count, side // 16, side // 16, 3), dtype=np.uint8)
    encoded = [encode_jpeg(picture.repeat(16, 0).repeat(16, 1)) for picture in smooth]
    windows = Windows(
        corner=np.zeros((count, 2), np.int32),
        extent=np.full((count, 2), side, np.int32),
        size=np.full((count, 2), target, np.int32),
        mirror=np.zeros(count, np.int32),
    )
    places = [(torch.device("cpu"), threads) for threads in ((1,) if effort.tiny else (1, 4, 8))]
    if topology.device.type == "cuda":
        places += [(topology.device, 4)]
    else:
        section.skipped.append(("GPU", "this run is on the CPU, and DALI's hybrid decoder needs CUDA"))
    for device, threads in places:
        decoder = PictureDecoder(device=device, num_threads=threads, resizes=True)

        def decode() -> None:
            pixels = np.full(count, side * side, dtype=np.int64)
            problems: dict[int, str] = {}
            decoded = decoder.decode(pixels, encoded.__getitem__, str, problems.__setitem__, windows)  # noqa: B023
            assert sum(tuple(picture.shape) == (target, target, 3) for _, picture in decoded) == count, problems

        seconds = median_seconds(decode, device, warmup=1, repeats=1 if effort.tiny else 5)
        section.rows.append({"device": device.type, "threads": threads, "pictures_per_s": count / seconds})
    return section


def measure_heads(topology: ParallelTopology, effort: Effort) -> Section:
    """Runs the benchmark of the class-center heads on this device, in a process of its own."""
    section = Section("Class-center heads", "")
    options: dict[str, Any] = {"--num-classes": _NUM_CLASSES, "--device": topology.device.type}
    if effort.tiny:
        options |= {"--num-classes": 300, "--embedding-size": 16, "--batch-size": 4, "--labels": 9}
        options |= {"--warmup": 1, "--steps": 1, "--repeats": 1, "--contenders": "default"}
    release_memory(topology.device)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "heads.json"
        words = [str(word) for pair in options.items() for word in pair]
        command = [sys.executable, str(_HEADS), *words, "--json", str(target)]
        section.note = f"`python tools/benchmark/heads.py {' '.join(words)}`; docs/benchmarks.md says what is compared."
        finished = subprocess.run(command, check=False, capture_output=True, text=True)
        if finished.returncode:
            section.skipped.append(("all", f"it ended with {finished.returncode}: {finished.stderr.strip()[-500:]}"))
            return section
        result = json.loads(target.read_text(encoding="utf-8"))
    for name, figures in result["contenders"].items():
        plain = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        section.rows.append({"contender": name, **plain})
    return section
