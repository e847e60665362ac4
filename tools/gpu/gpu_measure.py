"""Time, memory and rates on the machine at hand."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_ove.planning.devices import Device, find_device

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "triton", "nvidia-dali-cuda130")
# Part of the name that CUDA reports -> the device whose data sheet is known.
_DATA_SHEETS = {"H200": "h200-141g", "H100": "h100-80g", "A100": "a100-80g", "B200": "b200"}
# Cards of the same name with other rates than the data sheet's SXM modules.
_OTHER_CARDS = ("PCIe", "PCIE", "NVL", "MIG", "GB200")


@dataclass
class Section:
    """What one part of the benchmark found.

    Attributes:
        title: for the report.
        note: how to read it.
        rows: one dictionary per line of its table, with equal keys.
        skipped: (what, why) of everything that could not run here.
    """

    title: str
    note: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns what the figures were measured on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    machine: dict[str, Any] = {"device": "cpu", "processor": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        machine = {"device": properties.name, "compute_capability": capability, "cuda": torch.version.cuda}
        machine["memory_gib"] = round(properties.total_memory / 2**30, 1)
    return {**machine, "python": platform.python_version(), "packages": versions}


def data_sheet_of(device: torch.device) -> Device | None:
    """Returns the known rates of a device; None when it is not one of those."""
    if device.type != "cuda":
        return None
    return data_sheet_of_name(torch.cuda.get_device_name(device))


def data_sheet_of_name(name: str) -> Device | None:
    """Returns the known rates of a device by the name that CUDA reports."""
    if any(part in name for part in _OTHER_CARDS):
        return None
    found = next((ours for part, ours in _DATA_SHEETS.items() if part in name), None)
    return find_device(found, world_size=1) if found else None


def median_seconds(action: Callable[[], object], device: torch.device, *, warmup: int, repeats: int) -> float:
    """Returns the median time of an action, the device's work included."""
    times = []
    for index in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        if index >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Frees what is no longer referenced, and starts counting the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Returns the most that tensors took since `release_memory`; None on a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
