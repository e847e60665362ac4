"""The heads' Triton kernels, run by Triton's interpreter on the CPU, against plain float64 definitions."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ove.heads import triton_backend
from tests.support import head_kernels
from tests.support.head_kernels import Sizes
from tests.support.kernel_compiler import compiled_launches
from tests.support.triton_interpreter import interpreting_process

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

BF16 = torch.bfloat16
# Tiles have 16 of everything under the interpreter.
ODD = Sizes(a=53, b=21, e=40)
PADDED = Sizes(a=53, b=21, e=40, columns=32)
HOPPER_SHARED_BYTES = 227 * 1024
Interpreted = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    with interpreting_process(int) as call:
        yield call


@needs_triton
@pytest.mark.parametrize("filter_mode", ["off", "zero", "mask"])
@pytest.mark.parametrize("compute_dtype", [torch.float32, BF16])
def test_statistics_and_gradients(interpreted: Interpreted, filter_mode: str, compute_dtype: torch.dtype) -> None:
    options = {"filter_mode": filter_mode, "compute_dtype": compute_dtype}
    interpreted(head_kernels.check_statistics_and_gradients, ODD, **options)
    interpreted(head_kernels.check_statistics_and_gradients, PADDED, **options)


@needs_triton
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(a=1, b=1, e=1, s=1, k=1, padding=0),
        Sizes(a=16, b=16, e=16, s=16, k=16, padding=0),
        Sizes(a=33, b=17, e=47, s=1, k=3, padding=0),
        Sizes(a=5, b=3, e=24, s=2, k=3, padding=5),
        Sizes(a=20, b=4, e=16, s=2, k=0),
        Sizes(a=0, b=7, e=16, padding=0),
        Sizes(a=19, b=0, e=16),
    ],
)
@pytest.mark.parametrize("directions", [False, True])
def test_any_sizes(interpreted: Interpreted, sizes: Sizes, directions: bool) -> None:
    interpreted(head_kernels.check_statistics_and_gradients, sizes, directions=directions)


@needs_triton
@pytest.mark.parametrize("directions", [False, True])
def test_bf16_table(interpreted: Interpreted, directions: bool) -> None:
    options = {"compute_dtype": BF16, "table_dtype": BF16, "directions": directions}
    interpreted(head_kernels.check_statistics_and_gradients, ODD, **options)


@needs_triton
@pytest.mark.parametrize("compute_dtype", [torch.float32, BF16])
def test_weights_keep_their_digits(interpreted: Interpreted, compute_dtype: torch.dtype) -> None:
    interpreted(head_kernels.check_weights_keep_their_digits, ODD, compute_dtype=compute_dtype)


@needs_triton
def test_large_scale(interpreted: Interpreted) -> None:
    """e^72 and sums of such fit; the rounding of fp32 cosines counts 72 times."""
    interpreted(head_kernels.check_statistics_and_gradients, ODD, logit_scale=72.0)


@needs_triton
@pytest.mark.parametrize("compute_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("sizes", [ODD, Sizes(a=1, b=1, e=4, k=1, padding=0), Sizes(a=0, b=5, e=8, padding=0)])
def test_square_norms_and_accumulation(interpreted: Interpreted, sizes: Sizes, compute_dtype: torch.dtype) -> None:
    interpreted(head_kernels.check_square_norms, sizes, compute_dtype=compute_dtype)
    if sizes.a:
        interpreted(head_kernels.check_accumulate, sizes, compute_dtype=compute_dtype)


@needs_triton
@pytest.mark.parametrize("by_element", [True, False])
@pytest.mark.parametrize("first_moment", [torch.float32, BF16, None])
@pytest.mark.parametrize("factored", [True, False])
def test_update(interpreted: Interpreted, by_element: bool, first_moment: torch.dtype | None, factored: bool) -> None:
    options = {"by_element": by_element, "first_moment": first_moment, "factored": factored}
    interpreted(head_kernels.check_update, ODD, **options)


@needs_triton
@pytest.mark.parametrize("dithers", [True, False])
@pytest.mark.parametrize("by_element", [True, False])
def test_update_of_bf16_table(interpreted: Interpreted, dithers: bool, by_element: bool) -> None:
    options = {"table_dtype": BF16, "compute_dtype": BF16, "by_element": by_element, "dithers": dithers}
    interpreted(head_kernels.check_update, ODD, first_moment=BF16, **options)


@needs_triton
@pytest.mark.parametrize("sizes", [Sizes(a=6, b=3, e=20, padding=6), Sizes(a=17, b=16, e=16, padding=0)])
def test_update_of_padding_only_and_of_whole_tiles(interpreted: Interpreted, sizes: Sizes) -> None:
    interpreted(head_kernels.check_update, sizes)


@needs_triton
@pytest.mark.parametrize("compute_dtype", [torch.float32, BF16])
def test_same_bits_twice(interpreted: Interpreted, compute_dtype: torch.dtype) -> None:
    interpreted(head_kernels.check_determinism, PADDED, compute_dtype=compute_dtype)


@needs_triton
def test_available_where_it_can_run(interpreted: Interpreted) -> None:
    assert interpreted(triton_backend.is_available, torch.device("cpu"))
    assert not triton_backend.is_available(torch.device("cpu"))
    assert triton_backend.is_available(torch.device("cuda"))


def test_not_available_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not triton_backend.is_available(torch.device("cuda"))


@needs_triton
@pytest.mark.skipif(platform.system() != "Linux", reason="Triton brings its assembler on Linux only")
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), BF16])
def test_compiles_for_hopper(tmp_path: Path, dtype: torch.dtype) -> None:
    """The interpreter accepts what the compiler does not; tiles must fit, and bf16 products use the tensor cores."""
    sizes = Sizes(a=256, b=512, e=1024, s=8, k=8, padding=2)
    problem = head_kernels.make_problem(sizes, compute_dtype=BF16, table_dtype=dtype)
    options = {"first_moment": dtype, "by_element": dtype == torch.float32, "dithers": dtype == BF16}
    state = head_kernels.make_optimizer(problem, factored=True, **options)
    with compiled_launches(str(tmp_path)) as compiled:
        triton_backend.gather_directions(problem.table, problem.rows, problem.norms, BF16)
        buffer = head_kernels.run_statistics(problem)[-1]
        head_kernels.run_gradients(problem, buffer, state.radial)
        triton_backend.square_norms(buffer, problem.x @ problem.x.T, state.radial, compute_dtype=BF16)
        triton_backend.accumulate(torch.zeros(256, 1024), buffer, problem.x, compute_dtype=BF16)
        head_kernels.run_update(problem, state)
    assert len(compiled) == 8
    assert all(kernel.shared_bytes <= HOPPER_SHARED_BYTES for kernel in compiled)
    products = {
        "statistics_kernel",
        "embedding_gradient_kernel",
        "square_norm_kernel",
        "accumulate_kernel",
        "update_kernel",
    }
    assert {kernel.name for kernel in compiled if kernel.uses_wgmma} == products
