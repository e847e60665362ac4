"""The heads' Triton kernels on a GPU: against plain float64 definitions, and whole steps that never wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.heads import triton_backend
from megatron_ove.parallel.topology import ParallelTopology, destroy_topology, initialize_topology
from tests.support import head_kernels, head_steps
from tests.support.head_kernels import Sizes, relative_error
from tests.support.objective_steps import begin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not triton_backend.is_available(torch.device("cuda")),
        reason="needs a CUDA device and Triton",
    ),
]

BF16 = torch.bfloat16
# As one of eight ranks sees a head: a few ten thousand of its 250,000 rows, the embeddings of all.
LARGE = Sizes(a=30_011, b=509, e=1024, s=8, k=8, padding=300, spare_classes=5_000, columns=512)
# Few enough cosines for a gap in which a filter's threshold is safe from rounding.
SMALL = Sizes(a=301, b=37, e=136, s=3, k=4)


@pytest.mark.parametrize("table_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("directions", [False, True])
def test_large(table_dtype: torch.dtype, directions: bool) -> None:
    options = {"device": "cuda", "compute_dtype": BF16, "table_dtype": table_dtype, "filter_mode": "off"}
    head_kernels.check_statistics_and_gradients(LARGE, directions=directions, **options)


def test_weights_keep_their_digits() -> None:
    head_kernels.check_weights_keep_their_digits(LARGE, device="cuda", compute_dtype=BF16)


@pytest.mark.parametrize("filter_mode", ["off", "zero", "mask"])
@pytest.mark.parametrize("compute_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("batch", [5, 37, 100, 300])
def test_odd_sizes(filter_mode: str, compute_dtype: torch.dtype, batch: int) -> None:
    sizes = replace(SMALL, b=batch, a=11_000 // batch)
    options = {"device": "cuda", "compute_dtype": compute_dtype, "filter_mode": filter_mode}
    head_kernels.check_statistics_and_gradients(sizes, **options)


@pytest.mark.parametrize("compute_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("sizes", [SMALL, replace(LARGE, b=512)])
def test_square_norms_and_accumulation(sizes: Sizes, compute_dtype: torch.dtype) -> None:
    options = {"device": "cuda", "compute_dtype": compute_dtype, "filter_mode": "off"}
    head_kernels.check_square_norms(sizes, **options)
    head_kernels.check_accumulate(sizes, **options)


@pytest.mark.parametrize("by_element", [True, False])
@pytest.mark.parametrize("first_moment", [torch.float32, BF16, None])
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("table_dtype", [torch.float32, BF16])
def test_update(by_element: bool, first_moment: torch.dtype | None, factored: bool, table_dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"by_element": by_element, "first_moment": first_moment, "factored": factored}
    options |= {"table_dtype": table_dtype, "dithers": table_dtype == BF16, "compute_dtype": table_dtype}
    head_kernels.check_update(SMALL, device="cuda", filter_mode="off", **options)


def test_update_of_large_table() -> None:
    options: dict[str, Any] = {"device": "cuda", "compute_dtype": BF16, "filter_mode": "off"}
    head_kernels.check_update(replace(LARGE, b=512), by_element=False, **options)


@pytest.mark.parametrize("compute_dtype", [torch.float32, BF16])
def test_same_bits_twice(compute_dtype: torch.dtype) -> None:
    head_kernels.check_determinism(LARGE, device="cuda", compute_dtype=compute_dtype, filter_mode="off")


@pytest.fixture(scope="module")
def cuda_topology() -> Iterator[ParallelTopology]:
    yield initialize_topology(ParallelConfig(device="cuda"), seed=0)
    destroy_topology()


def run_steps(topology: ParallelTopology, backend: str, count: int) -> list[Tensor]:
    """Steps of two microbatches; all but the first under an error for whatever waits for the device.

    Returns:
        Per step the embeddings' gradients; then the table.
    """
    case = head_steps.make_case(
        num_classes=3_001,
        num_samples=96,
        embedding_size=256,
        width=10,
        backend=backend,
        labels_per_step=8,
        sample_rate=0.05,
        optim=ClassCenterOptimConfig(),
        compute_dtype="bfloat16",
    )
    objectives = head_steps.build(case, topology)
    batches = [head_steps.make_batch(case, samples) for samples in (range(48), range(48, 96))]
    embeddings = case.embeddings.to(topology.device)
    results = []
    for step in range(count):
        pooled = [part.clone().requires_grad_() for part in embeddings.split(48)]
        try:
            if step and topology.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            begin(objectives, step, batches)
            for batch, part in zip(batches, pooled, strict=True):
                features = head_steps.make_features(part, batch)
                objectives.forward(features, batch, {head_steps.NAME: 1 / 96}).loss.backward()
            objectives.gradient_norms()
            objectives.step(0.01)
        finally:
            if topology.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        results += [part.grad for part in pooled if part.grad is not None]
    return [*results, head_steps.table_of(objectives).weight.float()]


def test_steps_never_wait_and_agree_with_torch(cuda_topology: ParallelTopology) -> None:
    for found, expected in zip(
        run_steps(cuda_topology, "triton", 3), run_steps(cuda_topology, "torch", 3), strict=True
    ):
        assert relative_error(found, expected) < 3e-2
