"""`TokenAlignment`: the pixels of a token carry the language model's embedding of it.

Source: TokenFD / TokenOCR (Guan et al., 2025), whose training code was not published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.token_alignment import TokenAlignmentConfig
from megatron_ove.convert.token_table import read_token_table
from megatron_ove.data.windows import Windows, visible_share
from megatron_ove.objectives.base import Objective, ObjectiveContext
from megatron_ove.objectives.regions.box_tokens import tokens_in_boxes
from megatron_ove.objectives.regions.documents import documents_of
from megatron_ove.objectives.token_alignment.aligner import TokenAligner, alignment_losses, mean_of_cells
from megatron_ove.objectives.token_alignment.cells import AlignmentInputs, MapPlaces, map_bounds
from megatron_ove.objectives.token_alignment.token_boxes import PlacedToken, character_boxes, identities, place_tokens
from megatron_ove.outputs import LossTerms, VisionFeatures
from megatron_ove.parallel.host_tensors import host_tensor
from megatron_ove.parallel.random import mix64, stateless_generator
from megatron_ove.shards.documents import Document
from megatron_ove.shards.token_cache import TextTokenizer

if TYPE_CHECKING:
    from megatron_ove.data.sample_reader import SampleReader

LEAST_VISIBLE = 0.5
"""Share of a character's box that must lie in the window."""
_PURPOSE = 0x616C69676E  # "align": keeps this use of a sample's seed apart from others
_RANDOM_TABLE_SEED = 0


class TokenAlignment(Objective):
    """L1 + (1 - cosine) + sigmoid loss between tokens' rows and the mean features of their cells."""

    def __init__(self, name: str, config: TokenAlignmentConfig, context: ObjectiveContext) -> None:
        """Reads the table, which belongs to no model, optimizer or checkpoint.

        Raises:
            CheckpointError: it cannot be read.
        """
        self.name, self.sources = name, config.sources
        self._config, self._device = config, context.topology.device
        self._tokenizer = TextTokenizer(config.tokenizer_path)
        self._table = _table_of(config, self._tokenizer.vocab_size).to(self._device, context.dtype)  # [v, D]
        self.aligner = TokenAligner(
            config.map_widths(context.embedding_size),
            self._table.shape[1],
            device=self._device,
            dtype=context.dtype,
        )

    def modules(self) -> Mapping[str, nn.Module]:
        return {"aligner": self.aligner}

    def collate(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> AlignmentInputs:
        scale = 2**self._config.upsample
        first_segment = np.searchsorted(pack.sample.numpy(), np.arange(len(samples) + 1)).tolist()
        shown, num_seen, num_texts = [], 0, 0
        for sample, document, windows, first_page in documents_of(samples, self.sources, first_segment, reader):
            segments = range(first_segment[sample], first_segment[sample + 1])
            tokens, cells = self._visible_tokens(document, windows, first_page, segments, pack, scale)
            num_seen, num_texts = num_seen + len(tokens), num_texts + bool(document.text)
            chosen = self._draw(len(tokens), int(samples.seed[sample]))
            if chosen:
                shown.append(([tokens[i] for i in chosen], [cells[i] for i in chosen]))
        used = sorted({segment for _, cells in shown for token in cells for segment, _ in token})
        places = MapPlaces(pack, used, scale, self._device)
        all_cells = [
            np.concatenate([places.first_cell[segment] + own for segment, own in token])
            for _, cells in shown
            for token in cells
        ]
        tokens = [token for own, _ in shown for token in own]
        joined = np.concatenate(all_cells) if all_cells else np.zeros(0, dtype=np.int64)
        distinct, pair_cells = np.unique(joined, return_inverse=True)
        numbers = np.arange(len(tokens))

        def host(values: Any) -> Tensor:
            return host_tensor(np.asarray(values, dtype=np.int64), self._device)

        return AlignmentInputs(
            scale=scale,
            groups=places.groups,
            cells=host(distinct),
            pair_cells=host(pair_cells),
            pair_tokens=host(np.repeat(numbers, [len(own) for own in all_cells])),
            row_ids=host([i for token in tokens for i in token.ids]),
            row_tokens=host(np.repeat(numbers, [len(token.ids) for token in tokens])),
            identity=host(np.concatenate([np.zeros(0), *(identities(own) for own, _ in shown)])),
            lengths=[len(own) for own, _ in shown],
            num_seen=num_seen,
            num_texts=num_texts,
        )

    def num_items(self, batch: Batch) -> int:
        """Returns the number of tokens."""
        return batch.inputs[self.name].num_tokens

    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        inputs: AlignmentInputs = batch.inputs[self.name].to(self._device)
        means, scale, bias = self.aligner(features.tokens.squeeze(1), inputs)
        wanted = self.rows_of(inputs)
        parts = alignment_losses(means, wanted, inputs.identity, inputs.lengths, scale, bias)
        config = self._config
        weights = (config.l1_weight, config.cosine_weight, config.sigmoid_weight)
        loss = sum((weight * part for weight, part in zip(weights, parts, strict=True)), means.new_zeros(()))
        count = torch.tensor(float(inputs.num_tokens), device=loss.device)
        metrics = {"loss": (loss.detach(), count)}
        metrics |= {name: (one.detach(), count) for name, one in zip(("l1", "cosine", "sigmoid"), parts, strict=True)}
        seen, texts = (torch.tensor(float(x), device=loss.device) for x in (inputs.num_seen, inputs.num_texts))
        return LossTerms(loss, {**metrics, "tokens_used": (count, seen), "tokens_seen": (seen, texts)})

    def rows_of(self, inputs: AlignmentInputs) -> Tensor:
        """Returns [N, D] fp32, the table's row of each token; of several ids their mean."""
        rows = self._table[inputs.row_ids].float()
        each = torch.arange(len(rows), device=rows.device)
        return mean_of_cells(rows, each, inputs.row_tokens, inputs.num_tokens)

    def observe_held_out(self, features: VisionFeatures, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the metrics of training, and of how many tokens the likeliest cell of all maps shows them; beside it
        how many cells do, which is what a map that knows nothing would find."""
        inputs: AlignmentInputs = batch.inputs[self.name].to(self._device)
        metrics = dict(self.forward(features, batch).metrics)
        cells = F.normalize(
            self.aligner.project(self.aligner.cells(features.tokens.squeeze(1), inputs.groups)).float(), dim=-1
        )
        hits, chance = _pointing(cells, F.normalize(self.rows_of(inputs), dim=-1), inputs)
        return {**metrics, "points_right": hits, "points_right_by_chance": chance}

    def measure_held_out(
        self, observed: Sequence[Any], inputs: Sequence[Any], sample_counts: np.ndarray
    ) -> Mapping[str, tuple[Tensor | float, Tensor | float]]:
        """Adds up what was observed."""
        del sample_counts
        names = [name for one in observed[:1] for name in one]
        return {"samples": (float(sum(len(one.lengths) for one in inputs)), 1.0)} | {
            name: (sum(float(one[name][0]) for one in observed), sum(float(one[name][1]) for one in observed))
            for name in names
        }

    def _visible_tokens(
        self,
        document: Document,
        windows: Windows,
        first_page: int,
        segments: range,
        pack: PatchPack,
        scale: int,
    ) -> tuple[list[PlacedToken], list[list[tuple[int, np.ndarray]]]]:
        """Returns the tokens that can be seen and, of each, (segment, places in its map) for every piece of it."""
        boxes = character_boxes(document)
        inside: dict[int, tuple[int, np.ndarray]] = {}  # character box -> where it is seen
        for page, segment in enumerate(segments):
            here = np.flatnonzero(boxes.page == page)
            corners = windows.move_boxes(first_page + page, boxes.corners[here])
            height, width = windows.size[first_page + page].tolist()
            rows, columns = (scale * int(side) for side in pack.grids[segment, 1:])
            cells = tokens_in_boxes(corners, (height, width), (rows, columns))
            seen = np.flatnonzero(visible_share(corners, (height, width)) >= LEAST_VISIBLE)
            inside |= {int(here[i]): (segment, cells[i]) for i in seen}
        tokens, places = [], []
        for token in place_tokens(document, boxes, self._tokenizer, self._config.unit):
            own = [inside[box] for box in token.boxes if box in inside]
            if len(own) == len(token.boxes):  # half of a token is another one
                tokens.append(token)
                places.append(_by_segment(own))
        return tokens, places

    def _draw(self, count: int, seed: int) -> list[int]:
        """Returns the tokens of a sample that are used, in reading order; a function of its seed."""
        order = np.argsort(mix64(np.array([seed]), _PURPOSE, np.arange(count)), kind="stable")
        return sorted(order[: self._config.max_tokens].tolist())


def _by_segment(pieces: Sequence[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
    """Returns (segment, distinct cells) from pieces of which several may be of one segment."""
    found: dict[int, list[np.ndarray]] = {}
    for segment, cells in pieces:
        found.setdefault(segment, []).append(cells)
    return [(segment, np.unique(np.concatenate(own))) for segment, own in found.items()]


def _pointing(
    cells: Tensor, wanted: Tensor, inputs: AlignmentInputs
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns (tokens whose likeliest cell shows the token, tokens), and the mean share of cells that do.

    A query is looked for on all pages of its sample that show a drawn token; a cell that shows an equal one is right.
    """
    hits = cells.new_zeros(())
    shares = cells.new_zeros(())
    first = 0
    cell_of_pair = inputs.cells[inputs.pair_cells]
    bounds = map_bounds(inputs)
    for length in inputs.lengths:
        own = torch.arange(first, first + length, device=cells.device)
        is_mine = (inputs.pair_tokens >= first) & (inputs.pair_tokens < first + length)
        mine, tokens = cell_of_pair[is_mine], inputs.pair_tokens[is_mine] - first
        places = torch.bucketize(mine, bounds, right=True) - 1
        chosen = places.unique()
        start_stop = [(int(bounds[i]), int(bounds[i + 1])) for i in chosen.tolist()]
        rows = torch.cat([torch.arange(a, b, device=cells.device) for a, b in start_stop])  # cells of the sample's maps
        scores = wanted[own] @ cells[rows].T  # [n, cells]
        shows = torch.zeros(length, len(rows), dtype=torch.bool, device=cells.device)
        shows[tokens, torch.searchsorted(rows, mine)] = True
        is_same = inputs.identity[own][:, None] == inputs.identity[own][None]
        shows = (is_same.float() @ shows.float()) > 0
        hits = hits + shows.gather(1, scores.argmax(1, keepdim=True)).sum()
        shares = shares + shows.float().mean(1).sum()
        first += length
    count = torch.tensor(float(inputs.num_tokens), device=cells.device)
    return (hits, count), (shares, count)


def _table_of(config: TokenAlignmentConfig, vocab_size: int) -> Tensor:
    """Returns [v, D] fp32: rows of a language model, or random ones of length about 1."""
    if config.table.path is not None:
        return read_token_table(config.table.path)
    width = config.table.width or 0
    generator = stateless_generator(_RANDOM_TABLE_SEED, "token table", width)
    return torch.randn(vocab_size, width, generator=generator) * width**-0.5
