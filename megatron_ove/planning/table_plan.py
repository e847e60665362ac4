"""`TablePlan`: a table of rows on one rank, whatever the kind of its objective."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TablePlan:
    """One table on one rank of the last stage.

    Attributes:
        name: of the objective.
        num_rows: c_local.
        num_active: rows of a step, expected.
        num_sets: class sets.
        num_slots: label slots k.
        embedding_size: e.
        stored_bytes: weights, moments, step counts, norms.
        step_bytes: what a step keeps from its begin to its update.
        work_bytes: the largest tensors inside one microbatch's forward or backward.
        samples: [n] int64, samples that meet this table in each microbatch.
        is_stage_wide: whether all ranks of the stage share the table.
        is_dense: whether the rows' gradient is kept as [a, e] instead of two factors.
        statistics_bytes: of one number of the softmax statistics.
        compute_bytes: of one operand of the matrix products.
        moved_bytes: read and written by the update of a step.
    """

    name: str
    num_rows: int
    num_active: int
    num_sets: int
    num_slots: int
    embedding_size: int
    stored_bytes: int
    step_bytes: int
    work_bytes: int
    samples: np.ndarray
    is_stage_wide: bool
    is_dense: bool
    statistics_bytes: int
    compute_bytes: int
    moved_bytes: int

    @property
    def operations(self) -> float:
        """Of a step: cosines, gradient of the embeddings, gradient of the rows."""
        return 3 * 2.0 * self.num_active * self.embedding_size * float(self.samples.sum())
