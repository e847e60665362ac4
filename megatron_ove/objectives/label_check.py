"""Stored labels that are no classes of the objective that reads them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_ove.batch import Batch


def find_bad_label(
    name: str, sources: Sequence[str], num_classes: int, batches: Sequence[Batch], labels: Sequence[Tensor]
) -> str:
    """Returns a sentence about the first stored label that is no class id and not -1; "" when all are right.

    Args:
        name: of the objective.
        sources: whose labels are checked.
        num_classes: of the objective.
        batches: this replica's microbatches.
        labels: of each microbatch, [m, L] labels of its samples of these sources.
    """
    for batch, table in zip(batches, labels, strict=True):
        if not table.numel():
            continue
        is_bad = (table < -1) | (table >= num_classes)
        if bool(is_bad.any()):
            row, column = is_bad.nonzero()[0].tolist()
            sample = int(batch.samples.of(*sources)[row])
            source = batch.samples.source_names[int(batch.samples.source[sample])]
            return (
                f"sample '{batch.samples.keys[sample]}' of source '{source}' has the label id "
                f"{int(table[row, column])}, but objective '{name}' has num_classes = {num_classes}, so ids are 0 to "
                f"{num_classes - 1} (-1 for none); raise objectives.{name}.num_classes or write the shards of "
                f"'{source}' again with right labels"
            )
    return ""
