"""What a device can do, from its maker's data sheet, and the shares of it that training is assumed to reach.

Rates are dense ones (data sheets print twice as much, for 2:4 sparsity). Links are bytes per second in one direction.
The shares are assumptions until `make bench-gpu` replaces them; they decide estimated times, never memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_ove.errors import ConfigError

GPUS_PER_NODE = 8

GEMM_SHARE = 0.65
"""Share of the peak rate that matrix products of a few thousand rows and a width of a thousand or more reach."""
ATTENTION_SHARE = 0.40
"""Share that attention over segments of a few hundred to a few thousand tokens with head dim 64 reaches, forward and
backward together. Source: FlashAttention-2 (Dao, 2023), figures for A100, head dim 64, no mask: 0.35 to 0.6."""
MEMORY_SHARE = 0.80
"""Share of the memory bandwidth that element-wise passes reach."""
LINK_SHARE = 0.75
"""Share of a link's rate that collectives of some megabytes reach."""
COLLECTIVE_LATENCY_S = 20e-6
"""What a small collective takes at least."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or one process on a CPU.

    Attributes:
        name: as given on the command line.
        memory: bytes that exist.
        reserved: bytes that tensors cannot have: CUDA context, NCCL's buffers, what the allocator loses.
        rates: matrix products, operations per second: "bf16", "fp32", "fp8".
        bandwidth: of the memory, bytes per second.
        node_link: to a device of the same node, bytes per second and direction.
        network_link: to a device of another node, per device.
        source: where the figures come from.
        capability: CUDA compute capability; None = no GPU.
    """

    name: str
    memory: int
    reserved: int
    rates: dict[str, float]
    bandwidth: float
    node_link: float
    network_link: float
    source: str
    capability: tuple[int, int] | None = None

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"

    @property
    def usable(self) -> int:
        """Bytes that tensors can have."""
        return self.memory - self.reserved

    def rate(self, precision: str) -> float:
        """Operations per second of matrix products in a precision; bf16's where the device has no fp8."""
        return self.rates.get(precision, self.rates["bf16"])


def _gpu(
    name: str,
    gigabytes: float,
    rates: tuple[float, float, float | None],
    links: tuple[float, float, float],
    source: str,
    capability: tuple[int, int],
) -> Device:
    """`rates` in teraflops (bf16, fp32, fp8); `links` in gigabytes per second (memory, node, network)."""
    bf16, fp32, fp8 = rates
    known = {"bf16": bf16 * 1e12, "fp32": fp32 * 1e12} | ({"fp8": fp8 * 1e12} if fp8 else {})
    memory = int(gigabytes * 1e9)
    # 2 GB for context, libraries and NCCL; 5 % for an allocator that rounds and fragments.
    reserved = int(2e9 + 0.05 * memory)
    bandwidth, node, network = (link * 1e9 for link in links)
    return Device(name, memory, reserved, known, bandwidth, node, network, source, capability)


_GPUS = (
    _gpu(
        *("a100-80g", 80, (312, 19.5, None), (2039, 300, 25)),
        "NVIDIA A100 data sheet (SXM 80 GB); DGX A100: eight 200 Gb/s adapters for eight GPUs",
        (8, 0),
    ),
    _gpu(
        *("h100-80g", 80, (989, 67, 1979), (3350, 450, 50)),
        "NVIDIA H100 data sheet (SXM); DGX H100: one 400 Gb/s adapter a GPU",
        (9, 0),
    ),
    _gpu(
        *("h200-141g", 141, (989, 67, 1979), (4800, 450, 50)),
        "NVIDIA H200 data sheet (SXM); DGX H200: one 400 Gb/s adapter a GPU",
        (9, 0),
    ),
    _gpu(
        *("b200", 180, (2250, 75, 4500), (8000, 900, 50)),
        "NVIDIA DGX B200 data sheet, an eighth of it (1,440 GB, 64 TB/s, 72 / 144 Pflop/s with sparsity)",
        (10, 0),
    ),
)

DEVICE_NAMES = (*(gpu.name for gpu in _GPUS), "cpu")


def find_device(name: str, *, world_size: int) -> Device:
    """Returns a device by its name; "cpu" is this machine, shared by `world_size` processes of one thread each.

    Raises:
        ConfigError: there is no device of this name.
    """
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world_size
        # One core with AVX-512 at 3 GHz does 96 Gflop/s in fp32 at best; a channel of DDR5 moves about 20 GB/s.
        rates = {"bf16": 96e9, "fp32": 96e9}
        source = "this machine's memory, shared by all processes; one core each, rates assumed"
        return Device("cpu", memory, memory // 10, rates, 10e9, 2e9, 1e9, source)
    for gpu in _GPUS:
        if gpu.name == name:
            return gpu
    raise ConfigError(
        f"--gpu {name} is not a device whose figures are known, so nothing could be said about memory and time; use "
        f"one of {', '.join(DEVICE_NAMES)}"
    )


def device_of_torch(name: str) -> Device | None:
    """Returns the device that torch calls by `name` ("NVIDIA H100 80GB HBM3"); None when its figures are not known."""
    words = set(name.lower().replace("-", " ").split())
    is_slower_form = bool(words & {"pcie", "nvl"})
    return next((gpu for gpu in _GPUS if gpu.name.split("-")[0] in words and not is_slower_form), None)
