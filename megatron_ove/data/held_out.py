"""`HeldOutSamples`: samples that a run does not train on, the same ones each time, as microbatches of a replica.

They are read by the parts that training reads with, one round of microbatches after the other, so that memory does not
follow their number. Nothing of the training loader is touched: the exchanges here are the main thread's, over its
groups. A sample that cannot be read is left empty and recorded as in training, and is not tried again in this run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megatron_ove.batch import Batch
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.assembly import Collate, assemble_batches, device_positions, fill_in, room_for
from megatron_ove.data.background import BackgroundSteps
from megatron_ove.data.bad_samples import BadSample, record_bad_samples
from megatron_ove.data.build import build_source
from megatron_ove.data.packing import Budget, pack_samples
from megatron_ove.data.planner import MicrobatchPlan, length_multiple_of
from megatron_ove.data.sources.base import DataSource
from megatron_ove.data.step_decoder import DecodedShare, StepDecoder, places_of
from megatron_ove.data.step_share import StepShare, share_of
from megatron_ove.errors import DataError
from megatron_ove.shards.shard_set import ShardSet

if TYPE_CHECKING:
    from megatron_ove.parallel.topology import ParallelTopology

logger = logging.getLogger(__name__)

RECORD_PREFIX = "held_out/"
"""Before an objective's name: what records of unreadable samples name as their source."""
_MICROBATCHES_PER_ROUND = 16
"""Of a replica: enough to fill a pipeline, few enough to hold their pixels."""
_AHEAD = 2
"""Rounds that are decoded, or being decoded, beyond the present one."""
_CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class HeldOutRound:
    """Some microbatches of one replica.

    Attributes:
        batches: at least one; equally many and equally long on every replica, some of them empty.
        num_bad: samples in them that could not be read and have no labels.
    """

    batches: tuple[Batch, ...]
    num_bad: int


class HeldOutSamples:
    """The held-out samples of one objective.

    Attributes:
        sample_counts: [replicas] int64, samples of each.
    """

    def __init__(
        self,
        objective: str,
        config: TrainConfig,
        shards: ShardSet,
        topology: ParallelTopology,
        *,
        wants_pixels: bool = False,
    ) -> None:
        """Chooses samples and divides them into microbatches; the same on every rank.

        Args:
            objective: name.
            config: the run.
            shards: of `evaluation.sets`.
            topology: this rank's place.
            wants_pixels: whether the objective, which is on the last stage, looks at pixels.

        Raises:
            DataError: a sample has no patches, because the index is damaged.
        """
        self._wants_pixels = wants_pixels
        self.name = RECORD_PREFIX + objective
        self._config, self._topology, self._shards = config, topology, shards
        # What an objective collates belongs to one of its sources, so that is what the held-out samples come as.
        self._source_name = config.objectives[objective].sources[0]
        self._section = config.data.sources[self._source_name].without_chance()
        count = min(len(shards), config.evaluation.max_samples)
        self._rows = np.arange(count) * len(shards) // count
        source, seeds = self._new_source(), np.zeros(count, dtype=np.int64)
        self._sizes = source.count_tokens(self._rows, seeds)
        if self._sizes.min() < 1:
            row = int(self._rows[self._sizes.argmin()])
            raise DataError(
                f"sample {row} of evaluation.sets.{objective} has {max(0, self._sizes.min())} patches by its index, so "
                "the index is damaged; copy it again or write the shard set again"
            )
        parallel, budget = config.parallel, config.data.tokens_per_microbatch
        # As in training: megatron-core's interleaved schedule takes microbatches in groups of the number of stages.
        group = parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size else 1
        multiple = topology.data_size * group
        others = [
            Budget(one.measure(source, self._rows, seeds), one.capacity)
            for one in config.kinds.objectives[config.objectives[objective].kind].budgets(config, objective)
        ]
        packing = pack_samples(self._sizes, capacity=budget, multiple=multiple, others=others)
        self._microbatch, self._num_microbatches = packing.microbatch_index, packing.num_microbatches
        length_multiple = length_multiple_of(config) or budget
        self._length = min(-(-packing.longest // length_multiple) * length_multiple, budget)
        self._per_round = topology.data_size * lcm(group, _MICROBATCHES_PER_ROUND)
        self.sample_counts = np.bincount(self._microbatch % topology.data_size, minlength=topology.data_size)
        self._bad_since: dict[int, int] = {}

    @property
    def _has_pixels(self) -> bool:
        topology = self._topology
        return topology.is_first_stage or (self._wants_pixels and topology.is_last_stage)

    @property
    def num_rounds(self) -> int:
        return -(-self._num_microbatches // self._per_round)

    def know_bad(self, samples: Iterable[BadSample]) -> None:
        """Takes in records of earlier launches; the first of a sample counts."""
        for sample in samples:
            if sample.source == self.name:
                self._bad_since[sample.row] = min(sample.step, self._bad_since.get(sample.row, sample.step))

    def is_known_bad(self, row: int, step: int) -> bool:
        """Returns whether a sample of the set was found to be unreadable after `step` steps or before."""
        return self._bad_since.get(row, step + 1) <= step

    def plan(self, step: int) -> MicrobatchPlan:
        """Returns the plan of a round, counted from 0; ordinals are places among the chosen samples."""
        first = step * self._per_round
        chosen = np.flatnonzero((self._microbatch >= first) & (self._microbatch < first + self._per_round))
        return MicrobatchPlan(
            step=step,
            tokens_per_microbatch=self._length,
            num_microbatches=min(self._per_round, self._num_microbatches - first),
            source_index=np.zeros(len(chosen), dtype=np.int64),
            ordinals=chosen,
            rows=self._rows[chosen],
            seeds=np.zeros(len(chosen), dtype=np.int64),
            num_tokens=self._sizes[chosen],
            microbatch_index=self._microbatch[chosen] - first,
        )

    def rounds(self, step: int, collate: Collate | None) -> Iterator[HeldOutRound]:
        """Yields all samples of this replica; collective over its ranks.

        Args:
            step: steps done, for the record of samples that cannot be read.
            collate: makes the objective's inputs; on the last stage.

        Raises:
            DataError: a label is out of range, or what cannot be read cannot be recorded.
        """
        topology, source = self._topology, self._new_source()
        decoder, decoding = None, None
        if topology.tensor_rank == 0:
            rows = enumerate(self._rows.tolist())
            bad = frozenset((self._source_name, place) for place, row in rows if self.is_known_bad(row, step))
            decoder = StepDecoder(
                self,
                [source],
                topology,
                patch_size=self._config.encoder.patch_size,
                has_pixels=self._has_pixels,
                read_threads=self._config.data.read_threads,
                end_step=self.num_rounds,
                known_bad=dict.fromkeys(range(self.num_rounds), bad),
            )
            decoding = BackgroundSteps(
                decoder.decode, first_step=0, end_step=self.num_rounds, ahead=_AHEAD, finishes=False, name="held-out"
            )
        try:
            for number in range(self.num_rounds):
                decoded = decoding.take() if decoding else self._room_for(number)
                yield self._finish(decoded, source, step, collate)
        finally:
            if decoder is not None and decoding is not None and decoding.stop(_CLOSE_TIMEOUT_S):
                decoder.close()
            self._shards.close()

    def _finish(self, decoded: DecodedShare, source: DataSource, step: int, collate: Collate | None) -> HeldOutRound:
        topology, share = self._topology, decoded.share
        bad = self._agree_on_bad(decoded, step)
        positions = device_positions(decoded, topology.device)
        batches = assemble_batches(decoded, positions, bad, [source], collate)
        host_positions = decoded.positions if decoded.positions is not positions else None
        fill_in(decoded.patches, positions, host_positions, places_of(share, bad), topology)
        return HeldOutRound(batches, len(bad))

    def _agree_on_bad(self, decoded: DecodedShare, step: int) -> np.ndarray:
        """Returns the share's samples, ascending, that any rank of the replica could not read; records new ones."""
        topology = self._topology
        flags = torch.zeros(len(decoded.share.places), dtype=torch.int32)  # 1: recorded already, 2: new
        for sample, reason in decoded.problems.items():
            flags[sample] = 2 if reason else 1
        flags = flags.to(topology.device)
        for group in (topology.pipeline_group, topology.tensor_group):
            if group.size() > 1 and flags.numel():
                dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        flags = flags.cpu()
        if topology.tensor_rank == 0 and bool((flags == 2).any()):  # the ranks that decode; each knows its own reasons
            group = topology.pipeline_group
            reasons: list[Mapping[int, str]] = [{} for _ in range(group.size())]
            dist.all_gather_object(reasons, decoded.problems, group=group)
            if topology.is_first_stage:
                self._record(decoded.share, {k: v for part in reversed(reasons) for k, v in part.items() if v}, step)
        for place in (flags == 2).nonzero().flatten().tolist():
            self._bad_since.setdefault(int(decoded.share.rows[place]), step)
        return flags.nonzero().flatten().numpy()

    def _record(self, share: StepShare, reasons: Mapping[int, str], step: int) -> None:
        samples = [
            BadSample(
                step,
                self.name,
                int(share.ordinals[place]),
                int(share.rows[place]),
                self._shards.key(int(share.rows[place])),
                reason,
            )
            for place, reason in sorted(reasons.items())
        ]
        path = record_bad_samples(self._config.run_dir, self._topology.data_rank, samples)
        logger.warning(
            "Samples of evaluation.sets.%s that cannot be read are left out from now on: %d, which stand in %s; the "
            "first: %s.",
            self.name.removeprefix(RECORD_PREFIX),
            len(samples),
            path,
            samples[0].reason,
        )

    def _room_for(self, number: int) -> DecodedShare:
        topology = self._topology
        share = share_of(self.plan(number), topology.data_rank, topology.data_size)
        return room_for(share, self._config.encoder.patch_size, topology.device, has_pixels=self._has_pixels)

    def _new_source(self) -> DataSource:
        """Returns a source of its own for each time, so that what a decoder holds is given back in between."""
        return build_source(
            self._source_name,
            self._section,
            self._shards,
            kinds=self._config.kinds,
            patch_size=self._config.encoder.patch_size,
            device=self._topology.device,
            num_threads=self._config.data.num_threads,
        )
