"""`ClassCenters`: a table of class centers, sharded over ranks, of which a step touches only the active rows.

A plain object, not a module: DistributedDataParallel and Float16Module must not see it. There is neither a dense
gradient nor, unless asked for, a dense optimizer pass. A step is begin_step, any number of backward passes that add to
`step_table.gradient`, then apply_update or discard_update; until apply_update nothing that lasts has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
from torch import Tensor

from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.errors import CheckpointError
from megatron_ove.heads import triton_backend
from megatron_ove.heads.active_classes import ActiveRows
from megatron_ove.heads.center_update import CenterUpdate
from megatron_ove.heads.fused_softmax import SAMPLE_PADDING
from megatron_ove.heads.row_gradient import DenseRowGradient, FactoredRowGradient, RowGradient
from megatron_ove.heads.sampled_softmax import ActiveTable, chunks_of
from megatron_ove.parallel.class_order import classes_of_rows
from megatron_ove.parallel.random import stateless_generator
from megatron_ove.parallel.shard_range import shard_range

INITIAL_STD = 0.01
"""Standard deviation of fresh centers; only their direction enters the first losses."""

MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "steps"})
"""What of a table's state belongs to the run that made it."""

_INITIAL_BLOCK_ROWS = 1024
_SAVED_ROWS = 65536
_CLIP_EPSILON = 1e-6
# Rows that are touched in every fourth step or less often move at most four times as far when they are.
_LARGEST_LR_SCALE = 4.0


class ClassCenters:
    """One table; this rank holds rows `first_row` .. `first_row + num_rows - 1` (which classes: `class_order`).

    Attributes:
        weight: [c_local, e] fp32 or bf16; c_local differs by at most one between ranks and may be 0.
        exp_avg: [c_local, e] fp32 or bf16, first moment of AdamW, corrected for its bias; None without one.
        exp_avg_sq: second moment, corrected: [c_local, e] fp32 by element, or [c_local, 1] fp32 by row.
        steps: [c_local] int32, updates that each row has had.
        class_group: the ranks that share the table.
        lr_multiplier: its rate / the rate of dense weights.
        step_table: the active rows of the step under way.
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
        compute_dtype: torch.dtype = torch.float32,
        chunk_size: int = 1024,
        is_fused: bool = False,
    ) -> None:
        """
        Args:
            name: of the table, for the initialisation and messages.
            num_classes: rows of the whole table.
            embedding_size: e.
            seed: of the initialisation.
            optim: AdamW, its storage, and clipping.
            class_group: ranks over which the rows are sharded.
            replica_group: ranks that hold the same rows and see different samples; None = this rank alone holds them.
            gradient_scale: factor of every gradient (1 / data-parallel size: losses come multiplied by that size).
            device: of all tensors.
            compute_dtype: of the operands of the softmax's GEMMs.
            chunk_size: rows that are worked on at a time.
            is_fused: whether Triton kernels do the work.
        """
        self.name = name
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.first_row, stop = shard_range(num_classes, class_group.size(), class_group.rank())
        self.num_rows = stop - self.first_row
        self.lr_multiplier = optim.lr_multiplier
        self._optim = optim
        self.class_group = class_group
        self._replicas = replica_group if replica_group is not None and replica_group.size() > 1 else None
        self._gradient_scale = gradient_scale
        self._compute_dtype, self._chunk_size, self._is_fused = compute_dtype, chunk_size, is_fused
        self._memory = _StepMemory(device)
        self._update = CenterUpdate(
            optim, self.first_row, self.num_rows, embedding_size, seed=seed, chunk_size=chunk_size, device=device
        )
        self._update.fill(initial_blocks(seed, name, self.first_row, stop, embedding_size))
        self.discard_update()

    @property
    def weight(self) -> Tensor:
        return self._update.weight[:-1]

    @property
    def norms(self) -> Tensor:
        """[c_local] fp32, Euclidean norm of each row, never 0."""
        return self._update.norms[:-1]

    @property
    def exp_avg(self) -> Tensor | None:
        return None if self._update.mean is None else self._update.mean[:-1]

    @property
    def exp_avg_sq(self) -> Tensor:
        return self._update.square[:-1]

    @property
    def steps(self) -> Tensor:
        return self._update.steps[:-1]

    def begin_step(self, active: ActiveRows, samples: Sequence[int], active_share: float = 1.0) -> None:
        """Activates rows; reads them only to copy them into another compute dtype.

        Args:
            active: this rank's rows; may be none. Equal on the replicas of the table.
            samples: for each microbatch of the step, how many embeddings will meet the rows.
            active_share: of the whole table's rows; the same on every rank.
        """
        self._active_share = active_share
        self.step_table = ActiveTable(
            self._update.weight,
            self._update.norms,
            active,
            self._new_gradient(active.rows.numel(), samples),
            self._copy_directions(active.rows, len(samples)),
            self._compute_dtype,
            self._chunk_size,
            self._is_fused,
        )
        self._squares: Tensor | None = None
        self._norm: Tensor | None = None

    def gradient_norm(self) -> Tensor:
        """Returns the L2 norm of the step's gradient over the whole table, before clipping; collective.

        No further backward pass may follow. A NaN or inf anywhere in the gradient shows in the norm on every rank of
        the class group.

        Returns:
            Scalar float64, the same on every rank that shares the table, whatever their number.
        """
        if self._norm is None:
            norms = self._update.norms[self.step_table.active.rows]
            self._squares = self.step_table.gradient.square_norms().mul_((self._gradient_scale / norms).square_())
            square = self._squares.sum(dtype=torch.float64)
            if self.class_group.size() > 1:
                dist.all_reduce(square, group=self.class_group)
            self._norm = square.sqrt()
        return self._norm

    def apply_update(self, lr: float) -> None:
        """Clips by the norm over the whole table and updates rows; ends the step. Collective.

        Args:
            lr: learning rate of the rows; scaled as the options say.
        """
        norm, limit = self.gradient_norm(), self._optim.clip_grad_norm
        assert self._squares is not None
        clip = (limit / (norm + _CLIP_EPSILON)).clamp(max=1.0) if limit else torch.ones_like(norm)
        factor = (clip * self._gradient_scale).float()
        if self._optim.lr_scaling == "active_share" and self._optim.update == "row_sparse":
            lr *= min(1 / self._active_share, _LARGEST_LR_SCALE)
        self._update.apply(self.step_table, self._squares.mul_(clip.float().square()), factor, lr)
        self.discard_update()

    def discard_update(self) -> None:
        """Ends the step without touching the table."""
        device = self._update.weight.device
        none = torch.empty(0, dtype=torch.int64, device=device)
        self.begin_step(ActiveRows(none, torch.empty(0, 1, device=device)), [])

    def gradient_of_rows(self) -> Tensor:
        """Returns the step's gradient of its active rows, [a, e] fp32, before clipping; for tests and inspection."""
        self.gradient_norm()
        table = self.step_table
        factor = torch.tensor(self._gradient_scale, device=table.weight.device)
        parts = [
            self._update.gradient_of(table, chunk, weight.float(), factor) for chunk, weight in table.stored_chunks()
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.embedding_size)

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        """Returns weights, moments and step counts as megatron-core sharded tensors, in blocks; none without rows.

        The tensors are irregular shards with true rows only, so a checkpoint holds exactly `num_classes` rows and can
        be read by any number of ranks.

        Args:
            prefix: of the keys in the checkpoint, e.g. "objectives.pages.".
        """
        if self.num_rows == 0:
            # Never saved. Without any entry megatron-core would drop the whole branch from what it loads.
            return {"num_rows": LocalNonpersistentObject(0)}
        replica = self._replicas.rank() if self._replicas else 0
        return {
            key: {
                str(first): ShardedTensor(
                    prefix + key,
                    block,
                    block.dtype,
                    tuple(block.shape),
                    (self.num_classes, *block.shape[1:]),
                    (self.first_row + first, *(0 for _ in block.shape[1:])),
                    None,
                    replica_id=replica,
                )
                for first, block in _saved_blocks(data)
            }
            for key, data in self._state().items()
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what was read for the keys of `sharded_state_dict`.

        Raises:
            CheckpointError: a tensor is missing or does not have this rank's shape.
        """
        self._load(state, self._state())

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """As `load_state`, without moments and step counts: those of a new run stay as they are."""
        self._load(state, {key: data for key, data in self._state().items() if key not in MOMENTS})

    def load_whole(self, centers: Tensor, *, origin: str) -> None:
        """Takes over class centers [c, e] in the order of class ids.

        Args:
            centers: of all classes.
            origin: where they are from, for messages.

        Raises:
            CheckpointError: they have another shape.
        """
        if centers.shape != (self.num_classes, self.embedding_size):
            raise CheckpointError(
                f"{origin} holds class centers of shape {list(centers.shape)}, but '{self.name}' has "
                f"{self.num_classes} classes x {self.embedding_size}; use a head with the same classes"
            )
        rows = torch.arange(self.first_row, self.first_row + self.num_rows)
        self.weight.copy_(centers[classes_of_rows(rows, self.num_classes)])
        self._update.measure_norms()
        self.discard_update()

    def _load(self, state: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
        if self.num_rows == 0:
            return
        for key, data in wanted.items():
            for first, block in _saved_blocks(data):
                loaded = state.get(key, {}).get(str(first))
                found = "nothing" if loaded is None else f"shape {list(loaded.shape)}"
                if loaded is None or loaded.shape != block.shape:
                    raise CheckpointError(
                        f"the checkpoint has {found} for {key} of the class centers '{self.name}', where this rank "
                        f"needs {list(block.shape)} of {self.num_classes} classes x {self.embedding_size}; set "
                        "num_classes and encoder.hidden_size as they were, or use another run_dir to start anew"
                    )
                block.copy_(loaded)
        self.discard_update()

    def _new_gradient(self, num_active: int, samples: Sequence[int]) -> RowGradient:
        size, dtype, chunk_size = self.embedding_size, self._compute_dtype, self._chunk_size
        padding = SAMPLE_PADDING if self._is_fused else 1
        width = sum(-(-count // padding) * padding for count in samples)
        if self._replicas is not None or width > size:
            total = self._memory.take("row gradient", (num_active, size), torch.float32)
            return DenseRowGradient(total, self._replicas, compute_dtype=dtype, is_fused=self._is_fused)
        memory = self._memory.take("coefficients", (num_active, width), dtype if self._is_fused else torch.float32)
        return FactoredRowGradient(memory, size, compute_dtype=dtype, chunk_size=chunk_size, padding=padding)

    def _copy_directions(self, rows: Tensor, num_microbatches: int) -> Tensor | None:
        """Returns [a, e] normalized rows in the compute dtype, or None where reading them in place moves less."""
        weight, norms, dtype = self._update.weight, self._update.norms, self._compute_dtype
        if self._is_fused:
            return triton_backend.gather_directions(weight, rows, norms, dtype) if num_microbatches > 1 else None
        if weight.dtype == dtype:
            return None
        directions = self._memory.take("directions", (rows.numel(), self.embedding_size), dtype)
        for chunk, part in chunks_of(weight, rows, self._chunk_size):
            directions[chunk] = part.float().div_(norms[rows[chunk]][:, None])
        return directions

    def _state(self) -> dict[str, Tensor]:
        state = {
            "weight": self.weight,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "steps": self.steps,
            # Follow from the weights, but kernels that add in another order would not find the same last bits.
            "norms": self._update.norms[:-1],
        }
        return {key: data for key, data in state.items() if data is not None}


def _saved_blocks(data: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, rows): checkpoints are written and read block by block, for each is copied on the way."""
    for first in range(0, len(data), _SAVED_ROWS):
        yield first, data[first : first + _SAVED_ROWS]


class _StepMemory:
    """Memory that is used anew each step: asking the system for hundreds of megabytes costs more than filling them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Returns an uninitialized tensor; the one taken before under the same name must no longer be used."""
        size = shape[0] * shape[1]
        if size == 0:  # between steps: holding on to a block would keep it from being replaced
            return torch.empty(shape, dtype=dtype, device=self._device)
        if name not in self._blocks or self._blocks[name].numel() < size:
            self._blocks.pop(name, None)
            # The number of active rows varies a little from step to step.
            self._blocks[name] = torch.empty(size + size // 32, dtype=dtype, device=self._device)
        return self._blocks[name][:size].view(shape)


def initial_rows(seed: int, name: str, start: int, stop: int, embedding_size: int) -> Tensor:
    """Returns rows `start` .. `stop - 1` of a fresh table, [stop - start, e] fp32 from N(0, 0.01).

    Rows are drawn in blocks that do not depend on the caller's range, so a class starts alike under any sharding.
    """
    rows = torch.empty(stop - start, embedding_size)
    for first, block in initial_blocks(seed, name, start, stop, embedding_size):
        rows[first : first + len(block)] = block
    return rows


def initial_blocks(seed: int, name: str, start: int, stop: int, embedding_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, counted from `start`; block [r, e] fp32) of a fresh table, so that no copy of it is needed."""
    for number in range(start // _INITIAL_BLOCK_ROWS, -(-stop // _INITIAL_BLOCK_ROWS) if stop > start else 0):
        first = number * _INITIAL_BLOCK_ROWS
        begin, end = max(start, first), min(stop, first + _INITIAL_BLOCK_ROWS)
        generator = stateless_generator(seed, name, "class_centers", number)
        drawn = torch.randn(_INITIAL_BLOCK_ROWS, embedding_size, generator=generator)
        yield begin - start, drawn[begin - first : end - first].mul_(INITIAL_STD)
