"""Token alignment against its formulas with dense masks in float64; and which cells belong to which token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.token_alignment import TokenAlignmentConfig, TokenTableConfig
from megatron_ove.data.windows import Windows
from megatron_ove.objectives.token_alignment.aligner import TokenAligner, alignment_losses, mean_of_cells
from megatron_ove.objectives.token_alignment.objective import TokenAlignment
from megatron_ove.objectives.token_alignment.token_boxes import character_boxes, identities, place_tokens
from megatron_ove.outputs import VisionFeatures
from megatron_ove.shards.documents import Boxes, Document
from megatron_ove.shards.token_cache import TextTokenizer
from tests.support.documents import write_tokenizer

CPU = torch.device("cpu")
WIDTH, TABLE = 8, 6


def test_losses_are_the_printed_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, TABLE, generator=generator, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(9, 60, generator=generator) < 0.2
    masks[:, 0] |= ~masks.any(1)
    rows = torch.randn(9, TABLE, generator=generator, dtype=torch.float64)
    identity, sample = torch.tensor([3, 5, 3, 8, 1, 1, 2, 9, 3]), [0, 0, 0, 0, 1, 1, 1, 1, 1]
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    token, cell = masks.nonzero(as_tuple=True)
    means = mean_of_cells(features, cell, token, 9)
    ours = alignment_losses(means, rows, identity, [4, 5], scale, bias)

    dense = torch.stack([(features * mask[:, None]).sum(0) / mask.sum() for mask in masks])
    cosines = F.cosine_similarity(dense[:, None], rows[None], dim=-1)
    sigmoid = sum(
        -F.logsigmoid((1 if identity[i] == identity[j] else -1) * (scale * cosines[i, j] + bias))
        for i in range(9)
        for j in range(9)
        if sample[i] == sample[j]
    )
    theirs = ((dense - rows).abs().sum() / TABLE, (1 - cosines.diagonal()).sum(), sigmoid)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    leaves = (features, scale, bias)
    gradients = [torch.autograd.grad(sum(part.sum() for part in parts), leaves) for parts in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_a_doubled_map_is_that_of_a_convolution_over_the_picture() -> None:
    """Two pictures of one size and another one, in an order of their own."""
    aligner = TokenAligner([WIDTH, WIDTH // 2, WIDTH], TABLE, device=CPU, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for parameter in aligner.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    tokens = torch.randn(20, WIDTH, generator=generator, dtype=torch.float64)
    groups = (
        SimpleNamespace(rows=torch.arange(6, 18), grid=(2, 3)),
        SimpleNamespace(rows=torch.arange(4), grid=(4, 1)),
    )
    found = aligner.cells(tokens, groups)  # type: ignore[arg-type]
    assert found.shape == ((12 + 4) * 16, WIDTH)
    picture = tokens[12:18].T.reshape(1, WIDTH, 2, 3)
    for doubling in aligner.doublings:
        picture = F.conv_transpose2d(picture, doubling.conv.weight, stride=2, padding=1)
        picture = F.layer_norm(picture.movedim(1, -1), (picture.shape[1],), doubling.norm.weight, doubling.norm.bias)
        picture = picture.movedim(-1, 1)
    assert torch.allclose(found[96:192], picture[0].flatten(1).T)


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    return TextTokenizer(write_tokenizer(tmp_path))


TEXT = "reading 東京 alpha"
GLYPHS = Boxes.of([(0, 4 * i, 0, 4 * i + 4, 8, i, i + 1) for i, char in enumerate(TEXT) if char != " "])


def test_a_token_is_shown_by_its_characters(tokenizer: TextTokenizer) -> None:
    document = Document(TEXT, characters=GLYPHS)
    placed = place_tokens(document, character_boxes(document), tokenizer, "token")
    ids = tokenizer.encode([TEXT])[0]
    assert [token.ids[0] for token in placed] == [i for i in ids if tokenizer.decode([i]) != " "]
    seen = [TEXT[GLYPHS.spans[box, 0]] for token in placed for box in token.boxes]
    assert set("reading東京alpha") == set(seen)
    letters = place_tokens(document, character_boxes(document), tokenizer, "character")
    assert len(letters) == len(GLYPHS) and letters[0].ids == tuple(tokenizer.encode(["r"])[0])
    same = identities(letters)
    assert same[2] == same[9] == same[13] and len(set(same.tolist())) == len(
        {*TEXT} - {" "}
    )  # the a of reading and of alpha


def test_a_token_without_all_its_characters_is_left_out(tokenizer: TextTokenizer) -> None:
    document = Document(TEXT, characters=GLYPHS)
    known = Boxes(GLYPHS.page[1:], GLYPHS.corners[1:], GLYPHS.spans[1:])  # the r of reading has no box
    whole, rest = (place_tokens(document, boxes, tokenizer, "token") for boxes in (GLYPHS, known))
    assert [token.ids for token in rest] == [token.ids for token in whole][1:]


def test_without_character_boxes_words_are_divided(tokenizer: TextTokenizer) -> None:
    document = Document("ab c", words=Boxes.of([[0, 10, 0, 30, 8, 0, 2], [1, 5, 0, 9, 8, 3, 4]]))
    boxes = character_boxes(document)
    assert boxes.corners.tolist() == [[10, 0, 20, 8], [20, 0, 30, 8], [5, 0, 9, 8]] and boxes.page.tolist() == [0, 0, 1]
    assert not len(character_boxes(Document("nothing")))


def objective(tokenizer: TextTokenizer, **section: Any) -> TokenAlignment:
    config = TokenAlignmentConfig(
        kind="token_alignment",
        source="pages",
        tokenizer=str(tokenizer.path),
        table=TokenTableConfig(width=TABLE),
        **section,
    )
    context: Any = SimpleNamespace(topology=SimpleNamespace(device=CPU), embedding_size=WIDTH, dtype=torch.float32)
    made = TokenAlignment("align", config, context)
    generator = torch.Generator().manual_seed(2)
    for parameter in made.aligner.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return made


def microbatch(made: TokenAlignment, document: Document) -> tuple[Batch, VisionFeatures]:
    """Three samples that show the document on 1 x 5 tokens of 14 pixels, the second one unreadable."""
    samples = Samples.of_one_source("pages", ("a", "b", "c"), torch.arange(3))
    samples.is_valid[1] = False
    bounds = torch.arange(4, dtype=torch.int32) * 5
    grids = torch.tensor([[1, 1, 5]] * 3, dtype=torch.int32)
    pack = PatchPack(torch.zeros(17, 3), bounds, grids, torch.arange(3, dtype=torch.int32))
    size = np.array([[14, 70]] * 2)
    windows = Windows(np.zeros_like(size), np.array([[8, 70]] * 2), size, np.zeros(2, np.int32))
    reader: Any = SimpleNamespace(
        readable_documents=lambda name, rows: [document] * len(rows), windows=lambda *_: windows
    )
    batch = Batch({"main": pack}, samples, {"align": made.collate(samples, pack, reader)})
    tokens = torch.randn(17, 1, WIDTH, generator=torch.Generator().manual_seed(3))
    return batch, VisionFeatures(tokens.requires_grad_(), bounds, grids, pack.sample)


def test_the_objective_is_the_sum_of_its_parts(tokenizer: TextTokenizer) -> None:
    document = Document(TEXT, characters=GLYPHS)
    made = objective(tokenizer, upsample=1, l1_weight=2.0)
    batch, features = microbatch(made, document)
    inputs = batch.inputs["align"]
    assert inputs.lengths[0] == inputs.lengths[1] and len(inputs.lengths) == 2
    terms = made.forward(features, batch)
    assert made.num_items(batch) == sum(inputs.lengths) == int(terms.metrics["loss"][1])

    maps = features.tokens[[*range(5), *range(10, 15)], 0].unflatten(0, (2, 1, 5))
    (doubling,) = made.aligner.doublings
    cells = doubling(maps).flatten(0, 2)  # 2 x 10 a picture
    shown = made.aligner.project(cells)
    means = torch.stack(
        [shown[inputs.cells[inputs.pair_cells[inputs.pair_tokens == i]]].mean(0) for i in range(inputs.num_tokens)]
    )
    scale, bias = 10 * made.aligner.scale_offset.exp(), made.aligner.shift_offset - 2.71
    parts = alignment_losses(means, made.rows_of(inputs), inputs.identity, inputs.lengths, scale, bias)
    assert torch.allclose(terms.loss_sum, 2 * parts[0] + parts[1] + parts[2], rtol=1e-5)


def test_tokens_are_drawn_by_the_seed_and_counted(tokenizer: TextTokenizer) -> None:
    document = Document(TEXT, characters=GLYPHS)
    made = objective(tokenizer, upsample=0, max_tokens=2, unit="character")
    batch, features = microbatch(made, document)
    inputs = batch.inputs["align"]
    assert inputs.lengths == [2, 2] and (inputs.num_seen, inputs.num_texts) == (2 * len(GLYPHS), 2)
    assert inputs.cells.max() < 10  # without doubling a cell is a token
    metrics = made.forward(features, batch).metrics
    assert [float(x) for x in metrics["tokens_used"]] == [4.0, 2.0 * len(GLYPHS)]
    nothing, features = microbatch(made, Document("no boxes"))
    assert made.num_items(nothing) == 0 and float(made.forward(features, nothing).loss_sum) == 0


def test_pointing_is_right_where_a_cell_shows_the_token(tokenizer: TextTokenizer) -> None:
    """A map that carries the rows themselves points right at every token; one that is all alike, by chance."""
    document = Document(TEXT, characters=GLYPHS)
    made = objective(tokenizer, upsample=0, unit="character", max_tokens=5)
    batch, features = microbatch(made, document)
    inputs = batch.inputs["align"]
    rows = F.normalize(made.rows_of(inputs), dim=-1)
    carried = torch.zeros(10, TABLE)
    for token in range(inputs.num_tokens):
        carried[inputs.cells[inputs.pair_cells[inputs.pair_tokens == token]]] += rows[token]
    made.aligner.project = lambda cells: carried  # type: ignore[method-assign,assignment]
    observed = made.observe_held_out(features, batch)
    hits, count = (float(x) for x in observed["points_right"])
    chance = float(observed["points_right_by_chance"][0])
    assert count == 10 and hits >= 8 and chance < 5
