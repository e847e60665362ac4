"""Where a sample's labels stand among all classes of a sharded table, exactly, and the retrieval figures that follow.

The rank of a label is 1 + how many centers are nearer to the sample by cosine. To count needs neither the table in one
place nor the cosines with all classes at once: the cosines with the labels' own centers are summed over the ranks that
share the table, each rank then goes through its rows a chunk at a time and counts, and the counts are summed.

Ties: only a center that is strictly nearer counts, so a label is given the best of the ranks that it ties for; labels
of one sample have different ranks in any case. An embedding without a direction (zero, or not finite) is nearer to
everything than to its labels: its ranks are the worst ones.

Shape letters: n samples, e embedding, c_local rows of this rank, L labels of a sample.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_BLOCK_SAMPLES = 4096
"""Samples that go through the table together."""
_BLOCK_COSINES = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Cosines in memory at a time (4 and 64 MiB): on a CPU what stays in its cache, on a GPU what keeps it busy."""


@torch.no_grad()
def label_ranks(
    embeddings: Tensor,
    labels: Tensor,
    *,
    weight: Tensor,
    norms: Tensor,
    first_row: int,
    class_group: dist.ProcessGroup,
) -> Tensor:
    """Returns the rank of each label among all rows of the table; collective over `class_group`.

    Args:
        embeddings: [n, e] fp32 of any length, replicated over `class_group`.
        labels: [n, L] int64 rows of the whole table, -1 = none, a row once a sample at most; replicated.
        weight: [c_local, e] fp32 or bf16, this rank's rows; may be none.
        norms: [c_local] fp32, their Euclidean norms.
        first_row: of this rank in the whole table.
        class_group: ranks over which the table is sharded.

    Returns:
        [n, L] int64, counted from 1, 0 = no label; the same on every rank of the group.
    """
    # Without an epsilon: an embedding of zero becomes NaN, and so the worst.
    directions = embeddings / torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
    parts = [
        _ranks_of_block(x, block, weight, norms, first_row, class_group)
        for x, block in zip(directions.split(_BLOCK_SAMPLES), labels.split(_BLOCK_SAMPLES), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros_like(labels)


def _ranks_of_block(
    directions: Tensor, labels: Tensor, weight: Tensor, norms: Tensor, first_row: int, group: dist.ProcessGroup
) -> Tensor:
    has_label = labels >= 0
    local = labels - first_row
    local = local.where(has_label & (local >= 0) & (local < len(weight)), -1)
    targets = _sum_over(group, _target_cosines(directions, local, weight, norms))
    # Farthest label first, so that one search says how many labels of its sample a class beats (is strictly nearer
    # than); labels that every class beats come before, places without a label behind.
    targets = targets.masked_fill_(targets.isnan(), -torch.inf).masked_fill_(~has_label, torch.inf)
    targets, order = targets.sort(dim=1, stable=True)
    beaten = _sum_over(group, _count_beaten(directions, local, targets, weight, norms))  # [n, L + 1]
    # Classes that beat label j of the sorted ones beat more than j of them.
    nearer = beaten.flip(1).cumsum(1).flip(1)[:, 1:]
    places = has_label.sum(dim=1, keepdim=True) - torch.arange(labels.shape[1], device=labels.device)
    return torch.empty_like(labels).scatter_(1, order, nearer + places).masked_fill_(~has_label, 0)


def _target_cosines(directions: Tensor, local: Tensor, weight: Tensor, norms: Tensor) -> Tensor:
    """Returns the cosine of each sample with each of its labels, [n, L] fp32, 0 for those on other ranks."""
    cosines = torch.zeros(local.shape, device=local.device)
    for rows, out in zip(local.T if len(weight) else (), cosines.T, strict=False):
        here = rows.clamp(min=0)
        cosine = torch.linalg.vecdot(weight[here].float(), directions) / norms[here]
        out.copy_(cosine.where(rows >= 0, 0.0))
    return cosines


def _count_beaten(directions: Tensor, local: Tensor, targets: Tensor, weight: Tensor, norms: Tensor) -> Tensor:
    """Counts, of this rank's rows that are no label of the sample, those that beat exactly k of its labels.

    Args:
        directions: [n, e] fp32.
        local: [n, L] int64, labels as rows of this rank, -1 = elsewhere or none.
        targets: [n, L] fp32, cosines with the labels, ascending.
        weight, norms: as above.

    Returns:
        [n, L + 1] int64, column k.
    """
    num_samples, width = targets.shape
    counts = torch.zeros(num_samples, width + 1, dtype=torch.int64, device=targets.device)
    one = torch.ones((), dtype=torch.int64, device=targets.device)
    size = max(1, _BLOCK_COSINES[targets.device.type] // max(1, num_samples))
    starts = range(0, len(weight) if num_samples and width else 0, size)
    # A sample's own labels, in the order of rows, so that a chunk knows where its part of them begins and ends.
    samples, columns = (local >= 0).nonzero(as_tuple=True)
    own_rows, order = local[samples, columns].sort()
    samples = samples[order]
    bounds = torch.searchsorted(own_rows, torch.tensor([*starts, len(weight)], device=own_rows.device)).tolist()
    for number, start in enumerate(starts):
        rows = slice(start, min(start + size, len(weight)))
        cosines = (directions @ weight[rows].float().T).div_(norms[rows])
        own = slice(bounds[number], bounds[number + 1])
        cosines[samples[own], own_rows[own] - start] = -torch.inf
        beaten = torch.searchsorted(targets, cosines)  # NaN comes last: it beats all
        counts.scatter_add_(1, beaten, one.expand_as(beaten))
    return counts


def _sum_over(group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    if group.size() > 1 and tensor.numel():
        dist.all_reduce(tensor, group=group)
    return tensor


def each_label_once(labels: Tensor) -> Tensor:
    """Returns labels [n, L] (-1 = none) in falling order, each once a sample, in as few columns as hold them."""
    ordered = labels.sort(dim=1, descending=True).values
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    ordered = ordered.sort(dim=1, descending=True).values
    width = int((ordered >= 0).sum(dim=1).max()) if ordered.numel() else 0
    return ordered[:, :width]


def retrieval_sums(ranks: Tensor, num_classes: int, *, k: int = 10) -> dict[str, tuple[Tensor, Tensor]]:
    """What the ranks of labels say about samples, and what a random order of the classes would.

    Args:
        ranks: [n, L] int64, ranks of each sample's labels among all classes, 0 = no label.
        num_classes: of the table.
        k: cut-off of the recall.

    Returns:
        Name -> (sum over the samples with a label, their number), float64 scalars:
        "mean_average_precision": mean over labels of the precision at their rank;
        "first_right": 1 where the nearest center is a label's;
        "recall_at_<k>": share of the labels among the k nearest centers;
        and each of them with "chance_" in front, its expectation under a random order.

    Source: Manning, Raghavan, Schuetze, Introduction to Information Retrieval, section 8.4. With m of N classes right,
    precision at a right place i of a random order is (1 + (i - 1)(m - 1) / (N - 1)) / i in the mean; averaged over
    places this is (H + (m - 1)(N - H) / (N - 1)) / N with H = 1 + 1/2 + ... + 1/N.
    """
    is_label = ranks > 0
    ranks, num_labels = ranks[is_label.any(dim=1)], is_label.sum(dim=1).double()
    num_labels = num_labels[num_labels > 0]
    ranks = ranks.where(ranks > 0, torch.iinfo(torch.int64).max).sort(dim=1).values.double()
    places = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    # No label stands at a rank beyond float64's digits: its share is 0.
    precision = (places / ranks).where(ranks <= num_classes, 0.0)
    is_first = (ranks[:, :1] == 1).double()
    harmonic = float((1 / torch.arange(1, num_classes + 1, dtype=torch.float64)).sum())
    others = (num_labels - 1) * (num_classes - harmonic) / max(1, num_classes - 1)
    figures = {
        "mean_average_precision": precision.sum(dim=1) / num_labels,
        "first_right": is_first.sum(dim=1),
        f"recall_at_{k}": (ranks <= k).sum(dim=1) / num_labels,
        "chance_mean_average_precision": (harmonic + others) / num_classes,
        "chance_first_right": num_labels / num_classes,
        f"chance_recall_at_{k}": torch.full_like(num_labels, min(1.0, k / num_classes)),
    }
    count = torch.tensor(float(len(ranks)), dtype=torch.float64, device=ranks.device)
    return {name: (values.sum(), count) for name, values in figures.items()}
