"""Bridges: from the encoder's tokens of some pictures to the image tokens that a decoder sees.

How many image tokens a picture becomes follows from its patches alone, so that the room of a microbatch is planned
before anything is read. Weights are replicated over the tensor group, and so are tokens and gradients.

Shape letters: T tokens of the encoder, s pictures (segments), I image tokens, e width of the encoder, h of the decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ove.config.text_generation import BridgeConfig
from megatron_ove.model.attention import find_runs, split_runs
from megatron_ove.parallel.row_blocks import concatenate_ranges

SHUFFLE_SIDE = 2
"""Tokens of a side that `pixel_shuffle` joins."""


def count_image_tokens(config: BridgeConfig, lengths: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """Returns the image tokens of pictures, [s] int64.

    Args:
        config: of the bridge.
        lengths: [s], tokens of each picture.
        grids: [s, 3], (t, h, w) tokens; 0 where a picture is no full grid.
    """
    if config.kind == "queries":
        return np.full(len(lengths), config.num_queries, dtype=np.int64)
    if config.kind == "linear":
        return np.asarray(lengths, dtype=np.int64)
    sides = -(-grids[:, 1:].astype(np.int64) // SHUFFLE_SIDE)
    return grids[:, 0].astype(np.int64) * sides.prod(axis=1)


def token_rows(config: BridgeConfig, firsts: np.ndarray, lengths: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """Returns the encoder's tokens that a bridge reads, picture after picture: int64 [I], or for `pixel_shuffle`
    [I, 4] with -1 beyond the edges of a grid, or for `queries` [all tokens].

    Args:
        config: of the bridge.
        firsts: [s], first token of each picture.
        lengths, grids: as for `count_image_tokens`.
    """
    if config.kind != "pixel_shuffle":
        return concatenate_ranges(firsts, lengths)
    blocks = [_blocks_of(tuple(grid)) for grid in grids.tolist()]
    found = [np.where(block < 0, -1, block + first) for block, first in zip(blocks, firsts.tolist(), strict=True)]
    return np.concatenate(found) if found else np.empty((0, SHUFFLE_SIDE**2), dtype=np.int64)


def _blocks_of(grid: tuple[int, ...]) -> np.ndarray:
    """Returns the tokens of each 2 x 2 block of a grid in raster order, [blocks, 4]; -1 = outside."""
    frames, height, width = grid
    side = SHUFFLE_SIDE
    places = np.full((frames, -(-height // side) * side, -(-width // side) * side), -1, dtype=np.int64)
    places[:, :height, :width] = np.arange(frames * height * width).reshape(frames, height, width)
    blocks = places.reshape(frames, places.shape[1] // side, side, places.shape[2] // side, side)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(-1, side * side)


class Bridge(nn.Module, ABC):
    """Maps tokens that are on every tensor rank; each rank has the complete gradient."""

    @abstractmethod
    def forward(self, tokens: Tensor, rows: Tensor, lengths: list[int]) -> Tensor:
        """Returns [I, h].

        Args:
            tokens: [T, e], of the encoder.
            rows: of `token_rows`, on the device.
            lengths: tokens of each picture.
        """


class LinearBridge(Bridge):
    """One linear map a token (GOT-OCR2.0; LLaVA's first)."""

    def __init__(self, width: int, hidden: int, **placement: object) -> None:
        super().__init__()
        self.linear = nn.Linear(width, hidden, **placement)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, rows: Tensor, lengths: list[int]) -> Tensor:
        return self.linear(tokens[rows])


class PixelShuffleBridge(Bridge):
    """2 x 2 neighbours side by side, LayerNorm, linear, GELU, linear (InternVL 1.5, section 3.1; MonkeyOCRv2)."""

    def __init__(self, width: int, hidden: int, **placement: object) -> None:
        super().__init__()
        joined = SHUFFLE_SIDE**2 * width
        self.norm = nn.LayerNorm(joined, **placement)  # type: ignore[arg-type]
        self.fc1 = nn.Linear(joined, hidden, **placement)  # type: ignore[arg-type]
        self.fc2 = nn.Linear(hidden, hidden, **placement)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, rows: Tensor, lengths: list[int]) -> Tensor:
        blocks = tokens[rows.clamp(min=0)].masked_fill((rows < 0)[..., None], 0.0)  # [I, 4, e]
        return self.fc2(F.gelu(self.fc1(self.norm(blocks.flatten(1)))))


class QueryBridge(Bridge):
    """Learned queries look at the tokens of a picture, then a residual MLP and a linear map: a fixed number of image
    tokens whatever the picture's size (the resampler of BLIP-2 and UNIT, one layer)."""

    def __init__(self, width: int, hidden: int, *, num_queries: int, num_heads: int, **placement: object) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.empty(num_queries, width, **placement))  # type: ignore[call-overload]
        self.norm_queries = nn.LayerNorm(width, **placement)  # type: ignore[arg-type]
        self.norm_tokens = nn.LayerNorm(width, **placement)  # type: ignore[arg-type]
        self.query = nn.Linear(width, width, **placement)  # type: ignore[arg-type]
        self.key_value = nn.Linear(width, 2 * width, **placement)  # type: ignore[arg-type]
        self.out = nn.Linear(width, width, **placement)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(width, **placement)  # type: ignore[arg-type]
        self.fc1 = nn.Linear(width, 4 * width, **placement)  # type: ignore[arg-type]
        self.fc2 = nn.Linear(4 * width, width, **placement)  # type: ignore[arg-type]
        self.linear = nn.Linear(width, hidden, **placement)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, rows: Tensor, lengths: list[int]) -> Tensor:
        runs = find_runs(lengths, start=0)
        query = self.query(self.norm_queries(self.queries)).unflatten(-1, (self.num_heads, -1))  # [M, n, d]
        both = self.key_value(self.norm_tokens(tokens[rows])).unflatten(-1, (self.num_heads, -1))  # [R, n, 2d]
        key, value = both.chunk(2, dim=-1)
        attended = [query[:0].flatten(1)]
        for keys, values in zip(split_runs(key, runs), split_runs(value, runs), strict=True):
            queries = query.transpose(0, 1).expand(len(keys), -1, -1, -1)  # [count, n, M, d]
            found = F.scaled_dot_product_attention(queries, keys, values)
            attended.append(found.transpose(1, 2).flatten(0, 1).flatten(1))  # [count * M, e]
        states = self.queries.repeat(len(lengths), 1) + self.out(torch.cat(attended))
        states = states + self.fc2(F.gelu(self.fc1(self.norm(states))))
        return self.linear(states)


def build_bridge(
    config: BridgeConfig, width: int, hidden: int, *, num_heads: int, device: torch.device, dtype: torch.dtype
) -> Bridge:
    """Builds a bridge with uninitialised weights.

    Args:
        config: which one.
        width: e, of the encoder.
        hidden: h, of the decoder.
        num_heads: of the queries' attention, which divides `width`.
        device, dtype: of the weights.
    """
    if config.kind == "linear":
        return LinearBridge(width, hidden, device=device, dtype=dtype)
    if config.kind == "pixel_shuffle":
        return PixelShuffleBridge(width, hidden, device=device, dtype=dtype)
    assert config.num_queries is not None, "BridgeConfig asks for it"
    return QueryBridge(width, hidden, num_queries=config.num_queries, num_heads=num_heads, device=device, dtype=dtype)
