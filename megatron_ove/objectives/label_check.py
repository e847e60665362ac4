"""Stored labels that are no classes of the objective that reads them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ove.batch import Batch


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
