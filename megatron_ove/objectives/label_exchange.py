"""Labels of a step: checked on every replica, then exchanged once, so that nothing else about sizes must be asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.errors import DataError
from megatron_ove.parallel.collectives import all_gather_rows


def find_bad_label(name: str, source: str, num_classes: int, batches: Sequence[Batch]) -> str:
    """Returns a sentence about the first stored label that is no class id and not -1; "" when all are right.

    Args:
        name: of the objective.
        source: whose labels are checked.
        num_classes: of the objective.
        batches: this replica's microbatches.
    """
    for batch in batches:
        labels = batch.labels.get(source)
        if labels is None or not labels.numel():
            continue
        is_bad = (labels < -1) | (labels >= num_classes)
        if bool(is_bad.any()):
            row, column = is_bad.nonzero()[0].tolist()
            key = batch.sample_keys[int(batch.rows_of(source)[row])]
            return (
                f"sample '{key}' of source '{source}' has the label id {int(labels[row, column])}, but objective "
                f"'{name}' has num_classes = {num_classes}, so ids are 0 to {num_classes - 1} (-1 for none); raise "
                f"objectives.{name}.num_classes or write the shards of '{source}' again with right labels"
            )
    return ""


def exchange_labels(
    drawn: Sequence[Tensor], mistake: str, data_group: dist.ProcessGroup, *, on_every_rank: bool
) -> list[list[Tensor]]:
    """Returns the drawn labels of all replicas; one exchange of sizes and one of labels.

    Args:
        drawn: per microbatch of this replica [b, k] int64 on the CPU; equally many microbatches on every replica.
        mistake: what `find_bad_label` said.
        data_group: the replicas, for tensors on the CPU.
        on_every_rank: whether a mistake stops every rank of the run here.

    Returns:
        For each replica, for each of its microbatches, [b, k] int64.

    Raises:
        DataError: with the first replica's mistake, on all replicas.
    """
    sizes = [len(part) for part in drawn]
    if data_group.size() == 1:
        all_sizes, mistakes = [sizes], [mistake]
    else:
        mine = torch.tensor([bool(mistake), *sizes], dtype=torch.int64)
        gathered = mine.new_empty(data_group.size() * len(mine))
        dist.all_gather_into_tensor(gathered, mine, group=data_group)
        table = gathered.view(-1, len(mine)).tolist()
        all_sizes, mistakes = [row[1:] for row in table], [mistake]
        if any(row[0] for row in table):
            mistakes = [""] * data_group.size()
            dist.all_gather_object(mistakes, mistake, group=data_group)
    for text in mistakes:
        if text:
            raise DataError(text, on_every_rank=on_every_rank)
    totals = [sum(row) for row in all_sizes]
    labels = all_gather_rows(torch.cat(list(drawn)), data_group, totals)
    return [list(part.split(row)) for part, row in zip(labels.split(totals), all_sizes, strict=True)]
