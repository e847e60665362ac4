"""`ClassCenters`: a table of class centers, sharded over ranks, of which a step touches only the active rows.

A plain object, not a module: DistributedDataParallel and Float16Module must not see it. Weights are fp32 and there is
neither a dense gradient nor a dense optimizer pass. A step is begin_step, any number of backward passes that add to
`row_gradient`, then apply_update or discard_update; until apply_update nothing that lasts has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
from torch import Tensor

from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.errors import CheckpointError
from megatron_ove.optim.row_sparse_adamw import row_sparse_adamw_
from megatron_ove.parallel.random import stateless_generator
from megatron_ove.parallel.shard_range import shard_range

INITIAL_STD = 0.01
"""Standard deviation of fresh centers; only their direction enters the first losses."""

_INITIAL_BLOCK_ROWS = 1024
_NORM_EPSILON = 1e-12
_CLIP_EPSILON = 1e-6


class ClassCenters:
    """One table; this rank holds classes `first_class` .. `first_class + num_rows - 1`.

    Attributes:
        weight: [c_local, e] fp32; c_local differs by at most one between ranks and may be 0.
        exp_avg: [c_local, e] fp32, first moment of AdamW.
        exp_avg_sq: [c_local, e] fp32, second moment.
        steps: [c_local] int32, updates that each row has had.
        directions: [a, e] fp32, the step's active rows, normalized once; empty outside a step.
        row_gradient: [a, e] fp32, gradient of `directions`, added to by backward passes.
    """

    def __init__(
        self,
        name: str,
        *,
        num_classes: int,
        embedding_size: int,
        seed: int,
        optim: ClassCenterOptimConfig,
        class_group: dist.ProcessGroup,
        replica_group: dist.ProcessGroup | None,
        gradient_scale: float,
        device: torch.device,
    ) -> None:
        """
        Args:
            name: of the table, for the initialisation and messages.
            num_classes: rows of the whole table.
            embedding_size: e.
            seed: of the initialisation.
            optim: AdamW and clipping.
            class_group: ranks over which the rows are sharded.
            replica_group: ranks that hold the same rows and see different samples; None = this rank alone holds them.
            gradient_scale: factor of every gradient (1 / data-parallel size: losses come multiplied by that size).
            device: of all tensors.
        """
        self.name = name
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.first_class, stop = shard_range(num_classes, class_group.size(), class_group.rank())
        self.num_rows = stop - self.first_class
        self._optim = optim
        self._class_group = class_group
        self._replica_group = replica_group
        self._gradient_scale = gradient_scale
        self.weight = initial_rows(seed, name, self.first_class, stop, embedding_size).to(device)
        self.exp_avg = torch.zeros_like(self.weight)
        self.exp_avg_sq = torch.zeros_like(self.weight)
        self.steps = torch.zeros(self.num_rows, dtype=torch.int32, device=device)
        self.discard_update()

    def begin_step(self, rows: Tensor) -> None:
        """Activates rows: copies and normalizes them once for all microbatches of the step.

        Args:
            rows: [a] int64, distinct row indices within this rank's shard; may be empty. Equal on `replica_group`.
        """
        self._rows = rows
        chosen = self.weight[rows]
        self._norms = torch.linalg.vector_norm(chosen, dim=1, keepdim=True).clamp_(min=_NORM_EPSILON)
        self.directions = chosen.div_(self._norms)
        self.row_gradient = torch.zeros_like(self.directions)
        self._gradient: Tensor | None = None
        self._norm: Tensor | None = None

    def row_gradient_norm(self) -> Tensor:
        """Returns the L2 norm of the step's gradient over the whole table, before clipping; collective.

        Takes the gradient back through the normalization first; no further backward pass may follow. A NaN or inf
        anywhere in the gradient shows in the norm on every rank of `class_group`.

        Returns:
            Scalar float64, the same on every rank that shares the table, whatever their number.
        """
        norm = self._norm
        if norm is None:
            self._gradient = self._gradient_of_rows()
            square = torch.linalg.vector_norm(self._gradient, dtype=torch.float64).square()
            if self._class_group.size() > 1:
                dist.all_reduce(square, group=self._class_group)
            norm = self._norm = square.sqrt()
        return norm

    def apply_update(self, lr: float) -> None:
        """Clips by the norm over the whole table and updates the active rows; ends the step. Collective.

        Args:
            lr: learning rate of the rows.
        """
        optim = self._optim
        norm = self.row_gradient_norm()
        gradient = self._gradient
        assert gradient is not None
        if optim.clip_grad_norm:
            gradient *= (optim.clip_grad_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0).to(gradient.dtype)
        row_sparse_adamw_(
            self.weight,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            rows=self._rows,
            gradient=gradient,
            lr=lr,
            beta1=optim.beta1,
            beta2=optim.beta2,
            epsilon=optim.epsilon,
            weight_decay=optim.weight_decay,
        )
        self.discard_update()

    def discard_update(self) -> None:
        """Ends the step without touching the table."""
        self.begin_step(torch.empty(0, dtype=torch.int64, device=self.weight.device))

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        """Returns weights, moments and step counts as megatron-core sharded tensors; none on a rank without rows.

        The tensors are irregular shards with true rows only, so a checkpoint holds exactly `num_classes` rows and can
        be read by any number of ranks.

        Args:
            prefix: of the keys in the checkpoint, e.g. "objectives.pages.".
        """
        if self.num_rows == 0:
            # Never saved. Without any entry megatron-core would drop the whole branch from what it loads.
            return {"num_rows": LocalNonpersistentObject(0)}
        replica = self._replica_group.rank() if self._replica_group else 0
        return {
            key: ShardedTensor(
                prefix + key,
                data,
                data.dtype,
                tuple(data.shape),
                (self.num_classes, *data.shape[1:]),
                (self.first_class, *(0 for _ in data.shape[1:])),
                None,
                replica_id=replica,
            )
            for key, data in self._state().items()
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what was read for the keys of `sharded_state_dict`.

        Raises:
            CheckpointError: a tensor is missing or does not have this rank's shape.
        """
        if self.num_rows == 0:
            return
        for key, data in self._state().items():
            loaded = state.get(key)
            found = "nothing" if loaded is None else f"shape {list(loaded.shape)}"
            if loaded is None or loaded.shape != data.shape:
                raise CheckpointError(
                    f"the checkpoint has {found} for {key} of the class centers '{self.name}', where this rank needs "
                    f"{list(data.shape)} of {self.num_classes} classes x {self.embedding_size}; set num_classes and "
                    "encoder.hidden_size as they were, or use another run_dir to start anew"
                )
            data.copy_(loaded)
        self.discard_update()

    def _state(self) -> dict[str, Tensor]:
        return {
            "weight": self.weight,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "steps": self.steps,
        }

    def _gradient_of_rows(self) -> Tensor:
        """Gradient of the active rows themselves, [a, e]: summed over replicas, scaled, through the normalization."""
        gradient = self.row_gradient
        if self._replica_group is not None and self._replica_group.size() > 1 and gradient.numel():
            dist.all_reduce(gradient, group=self._replica_group)
        radial = (gradient * self.directions).sum(1, keepdim=True)
        return gradient.sub_(self.directions * radial).mul_(self._gradient_scale / self._norms)


def initial_rows(seed: int, name: str, start: int, stop: int, embedding_size: int) -> Tensor:
    """Returns rows `start` .. `stop - 1` of a fresh table, [stop - start, e] fp32 from N(0, 0.01).

    Rows are drawn in blocks that do not depend on the caller's range, so a class starts alike under any sharding.
    """
    rows = torch.empty(stop - start, embedding_size)
    for block in range(start // _INITIAL_BLOCK_ROWS, -(-stop // _INITIAL_BLOCK_ROWS)):
        first = block * _INITIAL_BLOCK_ROWS
        begin, end = max(start, first), min(stop, first + _INITIAL_BLOCK_ROWS)
        generator = stateless_generator(seed, name, "class_centers", block)
        drawn = torch.randn(_INITIAL_BLOCK_ROWS, embedding_size, generator=generator)
        rows[begin - start : end - start] = drawn[begin - first : end - first]
    return rows.mul_(INITIAL_STD)
