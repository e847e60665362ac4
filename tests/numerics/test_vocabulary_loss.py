"""Cross entropy over a split, padded vocabulary is torch's: losses, gradients, accuracy, however it is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.support.distributed import run_distributed

ROWS, WIDTH, VOCAB, PADDED = 37, 16, 200, 512  # with two ranks the second has padding only


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, table = (torch.randn(count, WIDTH, generator=generator) for count in (ROWS, PADDED))
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return rows, table, targets, torch.rand(ROWS, generator=generator)


def compare(rank: int, size: int, dtype: torch.dtype) -> tuple[float, ...]:
    import torch.distributed as dist

    from megatron_ove.decoder.vocabulary_loss import best_tokens, vocabulary_loss

    rows, table, targets, factors = inputs()
    rows, table = rows.to(dtype).requires_grad_(), table.to(dtype)
    whole = table.clone().requires_grad_()
    logits = F.linear(rows.float(), whole[:VOCAB].float())
    expected = F.cross_entropy(logits, targets, reduction="none")
    (expected * factors).sum().backward()
    assert rows.grad is not None and whole.grad is not None
    g_rows, rows.grad = rows.grad, None
    mine = table.chunk(size)[rank].clone().requires_grad_()
    common = {"group": dist.group.WORLD, "vocab_size": VOCAB}
    losses, is_right = vocabulary_loss(rows, mine, targets, chunk_rows=10, **common)
    (losses * factors).sum().backward()
    assert losses.dtype == torch.float32 and mine.grad is not None and rows.grad is not None
    best = best_tokens(rows.detach(), mine.detach(), **common)
    assert dtype != torch.float32 or torch.equal(best, logits.argmax(1))
    assert dtype != torch.float32 or torch.equal(is_right, logits.argmax(1) == targets)
    found = (
        float((losses - expected).abs().max() / expected.abs().max()),
        float((rows.grad - g_rows).float().abs().max() / g_rows.float().abs().max()),
        float((mine.grad - whole.grad.chunk(size)[rank]).float().abs().max() / whole.grad.float().abs().max()),
    )
    rows.grad = mine.grad = None
    vocabulary_loss(rows[:0], mine, targets[:0], **common)[0].sum().backward()
    assert not rows.grad.any() and not mine.grad.any()
    return found


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_losses_and_gradients_are_those_of_the_whole_table(size: int, dtype: torch.dtype, tolerance: float) -> None:
    for differences in run_distributed(compare, size, dtype):
        assert max(differences) < tolerance


def test_of_equal_logits_the_lowest_token_is_the_likeliest() -> None:
    assert run_distributed(tie, 2)[1] == [True, False, False]


def tie(rank: int, size: int) -> list[bool]:
    import torch.distributed as dist

    from megatron_ove.decoder.vocabulary_loss import vocabulary_loss

    table = torch.zeros(4, 8)
    _, is_right = vocabulary_loss(
        torch.ones(3, 8), table, torch.tensor([0, 3, 5]), group=dist.group.WORLD, vocab_size=7
    )
    return is_right.tolist()


def test_only_what_learns_gets_a_gradient() -> None:
    assert run_distributed(freeze, 1)[0] == (True, True)


def freeze(rank: int, size: int) -> tuple[bool, bool]:
    import torch.distributed as dist

    from megatron_ove.decoder.vocabulary_loss import vocabulary_loss

    rows, table, targets, _ = inputs()
    common = {"group": dist.group.WORLD, "vocab_size": VOCAB}
    rows.requires_grad_()
    vocabulary_loss(rows, table, targets, **common)[0].sum().backward()
    of_rows, rows.grad = rows.grad, None
    both = table.clone().requires_grad_()
    vocabulary_loss(rows, both, targets, **common)[0].sum().backward()
    alone = table.clone().requires_grad_()
    vocabulary_loss(rows.detach(), alone, targets, **common)[0].sum().backward()
    return torch.equal(rows.grad, of_rows), torch.equal(alone.grad, both.grad)


def test_the_logits_of_all_rows_are_never_there() -> None:
    """Bytes beyond weights and their gradient, of 512 rows over 40,000 tokens: a quarter of those with logits."""
    chunked, whole = run_distributed(peaks, 1)[0]
    assert chunked < whole / 4


def peaks(rank: int, size: int) -> tuple[int, int]:
    import torch.distributed as dist

    from megatron_ove.decoder.vocabulary_loss import vocabulary_loss

    rows, weight = torch.randn(512, 32).requires_grad_(), torch.randn(40_000, 32).requires_grad_()
    targets = torch.randint(0, 40_000, (512,))

    def chunked() -> None:
        common = {"group": dist.group.WORLD, "vocab_size": 40_000}
        vocabulary_loss(rows, weight, targets, chunk_rows=16, **common)[0].sum().backward()

    def whole() -> None:
        F.cross_entropy(F.linear(rows, weight), targets, reduction="sum").backward()

    found = []
    for run in (chunked, whole):
        rows.grad = weight.grad = None
        run()  # gradients are there from now on
        found.append(allocated_at_most(run))
    return found[0], found[1]


def allocated_at_most(run) -> int:
    """Returns the most bytes that torch had allocated at one time beyond what was there."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = most = 0
    for event in sorted(
        (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        now += event.nbytes()
        most = max(most, now)
    return most
