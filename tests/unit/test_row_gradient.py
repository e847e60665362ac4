"""Both forms of a step's row gradient against the product they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_ove.heads.row_gradient import DenseRowGradient, FactoredRowGradient, RowGradient

ROWS, SIZE, CHUNK = 11, 7, 4
SPLITS = [[5], [2, 3], [0, 4, 0, 1], [1, 1, 1, 1, 1]]


def make(form: str, num_samples: int, compute_dtype: torch.dtype = torch.float32) -> RowGradient:
    memory = torch.full((ROWS, SIZE if form == "dense" else num_samples), float("nan"))  # left by a step before
    if form == "dense":
        return DenseRowGradient(memory, None, compute_dtype=compute_dtype)
    return FactoredRowGradient(memory, SIZE, compute_dtype=compute_dtype, chunk_size=CHUNK)


def microbatches(split: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(coefficients [a, b], embeddings [b, e], cosines [a, b]) of each microbatch, with unit rows and embeddings."""
    generator = torch.Generator().manual_seed(3)
    rows = normalize(torch.randn(ROWS, SIZE, generator=generator), dim=1)
    result = []
    for count in split:
        embeddings = normalize(torch.randn(count, SIZE, generator=generator), dim=1)
        result.append((torch.randn(ROWS, count, generator=generator), embeddings, rows @ embeddings.T))
    return result


def collect(gradient: RowGradient, parts: list[tuple[Tensor, Tensor, Tensor]], *, left_out: int | None = None) -> None:
    """As the softmax does it: all places first, cosines into them, then coefficients chunk by chunk."""
    places = []
    for _, embeddings, cosines in parts:
        place = gradient.reserve(len(embeddings))
        if place is not None:
            place.copy_(cosines)
        places.append(place)
    for index, ((coefficients, embeddings, cosines), place) in enumerate(zip(parts, places, strict=True)):
        if index == left_out:
            continue
        for start in range(0, ROWS, CHUNK):
            chunk = slice(start, min(start + CHUNK, ROWS))
            gradient.radial[chunk] += (coefficients[chunk] * cosines[chunk]).sum(1)
            if place is not None:
                place[chunk] = coefficients[chunk]
            gradient.add(chunk, coefficients[chunk], embeddings, place)
        gradient.finish_microbatch(embeddings, place)


def check(gradient: RowGradient, parts: list[tuple[Tensor, Tensor, Tensor]], tolerance: float = 1e-5) -> None:
    product = torch.zeros(ROWS, SIZE)
    radial = torch.zeros(ROWS)
    for coefficients, embeddings, cosines in parts:
        product += coefficients @ embeddings
        radial += (coefficients * cosines).sum(1)
    # The rows are of norm 1: without its part along the row the gradient is shorter by exactly that part.
    expected = product.square().sum(1) - radial.square()
    torch.testing.assert_close(gradient.square_norms(), expected, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(gradient.radial, radial)
    factors = torch.linspace(-1, 2, ROWS)[:, None]
    for chunk in (slice(0, 4), slice(4, 11), slice(0, 0)):
        total = torch.full((len(range(ROWS)[chunk]), SIZE), 0.5)
        result = gradient.add_rows_to(total, chunk, factors[chunk])
        torch.testing.assert_close(result, 0.5 + factors[chunk] * product[chunk], rtol=tolerance, atol=tolerance)
        assert result is total


@pytest.mark.parametrize("form", ["factored", "dense"])
@pytest.mark.parametrize("split", SPLITS)
def test_it_is_the_sum_over_microbatches(form, split):
    gradient, parts = make(form, sum(split)), microbatches(split)
    collect(gradient, parts)
    check(gradient, parts)


@pytest.mark.parametrize("form", ["factored", "dense"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_microbatch_that_is_not_finished_counts_nothing(form, split):
    for left_out in range(len(split)):
        gradient, parts = make(form, sum(split)), microbatches(split)
        collect(gradient, parts, left_out=left_out)
        check(gradient, [part for index, part in enumerate(parts) if index != left_out])


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_without_any_microbatch_it_is_zero(form):
    for num_samples in (0, 5):
        gradient = make(form, num_samples)
        check(gradient, [])
        assert not gradient.square_norms().any()


def test_bf16_products_are_close():
    gradient, parts = make("factored", 5, torch.bfloat16), microbatches([2, 3])
    collect(gradient, parts)
    check(gradient, parts, tolerance=0.02)


def test_a_square_never_falls_below_the_rounding_of_its_terms():
    """Coefficients of one sample that lies on every row: all of its gradient is along the row, the rest is rounding."""
    embedding = normalize(torch.ones(1, SIZE), dim=1)
    parts = [(torch.linspace(0.1, 1e3, ROWS)[:, None], embedding, torch.ones(ROWS, 1) * (1 + 1e-7))]
    for form in ("factored", "dense"):
        gradient = make(form, 1)
        collect(gradient, parts)
        share = gradient.square_norms() / gradient.radial.square()
        assert (share > 0).all() and (share < 1e-5).all()


def test_sums_are_fp32_whatever_holds_the_coefficients():
    gradient = FactoredRowGradient(
        torch.empty(ROWS, 16, dtype=torch.bfloat16), SIZE, compute_dtype=torch.bfloat16, chunk_size=CHUNK, padding=16
    )
    assert gradient.radial.dtype == gradient.embeddings.dtype == torch.float32


def test_more_samples_than_announced_are_refused():
    gradient = make("factored", 5)
    gradient.reserve(4)
    with pytest.raises(RuntimeError, match="6 samples in a step that was begun with 5"):
        gradient.reserve(2)
