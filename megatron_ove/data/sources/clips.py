"""Clips: stored patches or stored frames, by a strategy that is drawn per sample.

No video is decoded in training: a clip is stored as JPEGs of its selected patches (mosaics) and of every frame of its
temporal grid, all at grid size, so nothing is resized and pixels are exactly those of a plain decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from megatron_ove.config.data import VideoSourceConfig, list_choices
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.patchify import grid_positions, write_patches
from megatron_ove.data.picture_decoder import PictureDecoder
from megatron_ove.data.read_ahead import MemberReader
from megatron_ove.data.sampler import draw_choice, draw_uniform
from megatron_ove.data.sources.base import DataSource, Segments
from megatron_ove.errors import DataError
from megatron_ove.shards.format import MOSAIC_MEMBER, POSITIONS_MEMBER, DatasetInfo, frame_member, mosaic_size
from megatron_ove.shards.samples import read_positions

CODEC, FRAME_SAMPLING, COLLAGE = range(3)
_DRAW_STRATEGY = 0
_DRAW_FIRST_FRAME = 1
"""Draws 1 .. num_frames are the frames."""
_DRAW_NUM_FRAMES, _DRAW_BUDGET = 1 << 20, (1 << 20) + 1
"""Beyond any number of frames."""


class VideoSource(DataSource):
    """Cluster-labelled clips on a temporal grid (usually 64 frames)."""

    def __init__(self, name: str, config: VideoSourceConfig, **common: Any) -> None:
        """Prepares a source; `common` are the arguments of `DataSource` other than name and weight."""
        super().__init__(name, config.weight, **common)
        self._config = config
        self._frames, self._grid_height, self._grid_width = self.shards.info.clip_grid
        self._decoder = PictureDecoder(device=self.device, num_threads=self.num_threads, resizes=False)

    def segments(self, rows: np.ndarray, seeds: np.ndarray) -> Segments:
        strategies, num_frames = self.strategies(seeds), self._num_frames(seeds)
        budgets = draw_choice(list_choices(self._config.max_patches), seeds, _DRAW_BUDGET)
        selected = np.minimum(self.shards.num_patches[rows], budgets).astype(np.int64)
        grids = np.empty((len(rows), 3), dtype=np.int32)
        grids[:, 0], grids[:, 1], grids[:, 2] = num_frames, self._grid_height, self._grid_width
        is_collage = strategies == COLLAGE
        grids[is_collage, 1] *= grids[is_collage, 0]
        grids[is_collage, 0] = 1
        grids[strategies == CODEC] = 0
        lengths = np.where(strategies == CODEC, selected, grids.astype(np.int64).prod(axis=1))
        return Segments(np.ones(len(rows), dtype=np.int64), lengths, grids)

    def strategies(self, seeds: np.ndarray) -> np.ndarray:
        """Returns the strategy, [n] int64 (CODEC, FRAME_SAMPLING or COLLAGE), of samples with `seeds`, [n] int64."""
        shares = self._config.strategies
        draws = draw_uniform(seeds, _DRAW_STRATEGY)
        return np.searchsorted([shares.codec, shares.codec + shares.frame_sampling], draws, side="right")

    def frames(self, seed: int) -> np.ndarray:
        """Returns the frames, [num_frames] int64 ascending, that a sample shows: a random one of each equal bin."""
        (count,) = self._num_frames(np.array([seed]))
        draws = np.concatenate([draw_uniform(np.array([seed]), _DRAW_FIRST_FRAME + i) for i in range(count)])
        size = self._frames // count
        return np.arange(count) * size + (draws * size).astype(np.int64)

    def picture_members(self, rows: np.ndarray, seeds: np.ndarray) -> list[tuple[int, str]]:
        members = []
        for row, seed, strategy in zip(rows.tolist(), seeds.tolist(), self.strategies(seeds), strict=True):
            if strategy == CODEC:
                members.append((row, MOSAIC_MEMBER))
            else:
                members += [(row, frame_member(int(frame))) for frame in self.frames(seed)]
        return members

    def position_members(self, rows: np.ndarray, seeds: np.ndarray) -> list[tuple[int, str]]:
        return [(row, POSITIONS_MEMBER) for row in rows[self.strategies(seeds) == CODEC].tolist()]

    def positions(self, row: int, seed: int, read: MemberReader | None = None) -> np.ndarray:
        strategy = int(self.strategies(np.array([seed]))[0])
        if strategy == CODEC:
            (count,) = self.count_tokens(np.array([row]), np.array([seed]))
            return self._selected_positions(row, read or self.shards.read)[self._evenly_spaced(row, int(count))]
        height, width, frames = self._grid_height, self._grid_width, self.frames(seed)
        if strategy == FRAME_SAMPLING:
            return np.concatenate([grid_positions(height, width, frame=int(frame)) for frame in frames])
        return grid_positions(height * len(frames), width)

    def decode_into(
        self, rows: np.ndarray, seeds: np.ndarray, targets: Sequence[Tensor], read: MemberReader | None = None
    ) -> dict[int, str]:
        pictures: list[tuple[int, str, Tensor]] = []  # (place in rows, member, where its patches go)
        per_frame = self._grid_height * self._grid_width
        for place, (seed, strategy, target) in enumerate(zip(seeds, self.strategies(seeds), targets, strict=True)):
            if strategy == CODEC:
                pictures.append((place, MOSAIC_MEMBER, target))
                continue
            for i, frame in enumerate(self.frames(int(seed))):
                part = target[i * per_frame : (i + 1) * per_frame]
                pictures.append((place, frame_member(int(frame)), part))
        problems: dict[int, str] = {}
        row_of = [int(rows[place]) for place, _, _ in pictures]
        read = read or self.shards.read

        def reject(i: int, reason: str) -> None:
            problems.setdefault(pictures[i][0], reason)

        decoded = self._decoder.decode(
            np.array([prod(self._size(row_of[i], pictures[i][1])) for i in range(len(pictures))], dtype=np.int64),
            lambda i: read(row_of[i], pictures[i][1]),
            lambda i: f"{pictures[i][1]} of {self.shards.describe(row_of[i])}",
            reject,
        )
        for i, picture in decoded:
            _, member, target = pictures[i]
            size = self._size(row_of[i], member)
            if tuple(picture.shape[:2]) != size:
                reject(
                    i,
                    f"{member} of {self.shards.describe(row_of[i])} has {picture.shape[1]} x {picture.shape[0]} pixels "
                    f"where {size[1]} x {size[0]} were stored, so the shard is damaged; copy it again",
                )
                continue
            chosen = self._evenly_spaced(row_of[i], len(target)) if member == MOSAIC_MEMBER else None
            write_patches(picture, target, self.patch_size, chosen)
        return problems

    def _num_frames(self, seeds: np.ndarray) -> np.ndarray:
        return draw_choice(list_choices(self._config.num_frames), seeds, _DRAW_NUM_FRAMES)

    def _evenly_spaced(self, row: int, count: int) -> np.ndarray:
        """Returns `count` places, [count] int64 ascending, among the selected patches of a clip: all of its time."""
        return np.arange(count) * int(self.shards.num_patches[row]) // count

    def _size(self, row: int, member: str) -> tuple[int, int]:
        """Returns (height, width) in pixels of a stored picture."""
        if member == MOSAIC_MEMBER:
            return mosaic_size(int(self.shards.num_patches[row]), self.patch_size)
        return int(self.shards.height[row]), int(self.shards.width[row])

    def _selected_positions(self, row: int, read: MemberReader) -> np.ndarray:
        stored = read(row, POSITIONS_MEMBER)
        try:
            positions = read_positions(stored, self.shards.info)
        except DataError as error:
            raise DataError(f"{self.shards.describe(row)}: {error}; copy or write its shard again") from error
        if len(positions) != self.shards.num_patches[row]:
            raise DataError(
                f"{self.shards.describe(row)} has {len(positions)} selected patches, but its index says "
                f"{self.shards.num_patches[row]}; index and shards are from different runs: copy both again"
            )
        return positions


def find_mismatches(config: TrainConfig, name: str, info: DatasetInfo) -> list[str]:
    """Returns a sentence for everything in which stored clips do not fit a run.

    Args:
        config: the run.
        name: of the source.
        info: description of its shard set.
    """
    source, place = config.data.sources[name], f"data.sources.{name}"
    assert isinstance(source, VideoSourceConfig)
    problems = []
    if info.patch_size != config.encoder.patch_size:
        problems.append(
            f"encoder.patch_size = {config.encoder.patch_size}, but the clips of {source.where} are stored as patches "
            f"of {info.patch_size} pixels and are not resized; use patch_size: {info.patch_size} or write the shard "
            "set again"
        )
    frames = getattr(config.encoder, "rope_temporal_size", info.frames)  # of encoders that have a grid of time
    if info.frames != frames:
        problems.append(
            f"encoder.rope_temporal_size = {frames}, but the clips of {source.where} lie on "
            f"a time grid of {info.frames} frames, so an exported model would place frames elsewhere than training "
            f"did; set it to {info.frames} or write the shard set again"
        )
    _, rows, columns = info.clip_grid
    budget, strategies = config.data.tokens_per_microbatch, source.strategies
    shows_frames = strategies.frame_sampling + strategies.collage > 0
    for count in dict.fromkeys(list_choices(source.num_frames)):
        if info.frames % count:
            problems.append(
                f"{place}.num_frames = {count} does not divide the {info.frames} stored frames of {source.where}, so "
                f"the bins that frames are drawn from would be unequal; use a divisor of {info.frames}"
            )
        tokens = count * rows * columns
        if tokens > budget and shows_frames:
            problems.append(
                f"{place}.num_frames = {count} frames of {rows} x {columns} patches make {tokens} patches, more than "
                f"data.tokens_per_microbatch = {budget}; raise the budget or use fewer frames"
            )
    return problems
