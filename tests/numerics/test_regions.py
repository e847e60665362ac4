"""Regions against their definitions, written down densely in float64: which tokens, which labels, which embedding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.regions import RegionConfig
from megatron_ove.data.windows import Windows
from megatron_ove.objectives.regions.box_tokens import tokens_in_boxes
from megatron_ove.objectives.regions.region_items import RegionItems
from megatron_ove.objectives.regions.region_labels import token_labels, word_labels
from megatron_ove.objectives.regions.region_pool import RegionPool, mean_of_regions
from megatron_ove.outputs import VisionFeatures
from megatron_ove.shards.documents import Boxes, Document
from megatron_ove.shards.token_cache import TextTokenizer
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary
from tests.support.documents import write_tokenizer

CPU = torch.device("cpu")
WIDTH = 6


@pytest.mark.parametrize(
    ("box", "tokens"),
    [
        ((0, 0, 40, 30), list(range(12))),  # all of it
        ((0, 0, 14, 10), [0]),
        ((4, 0, 16, 10), [0, 1]),  # half of the first, more than half of the second
        ((6, 0, 16, 10), [1]),  # less than half of the first
        ((12, 3, 14, 4), [1]),  # smaller than half a token: where its middle lies
        ((-9, -9, 1, 1), [0]),
        ((39, 25, 90, 90), [11]),
        ((5, 14, 25, 26), [5, 6, 9, 10]),  # halves go to the box that ends there
    ],
)
def test_a_box_has_the_tokens_it_covers_half_of(box: tuple[int, ...], tokens: list[int]) -> None:
    """A picture of 40 x 30 pixels, 4 x 3 tokens of 10."""
    (found,) = tokens_in_boxes(np.array([box]), (30, 40), (3, 4))
    assert found.tolist() == tokens


def test_neighbouring_boxes_share_no_token() -> None:
    edges = np.array([0, 7, 19, 31, 58, 80])
    boxes = np.column_stack([edges[:-1], np.zeros(5), edges[1:], np.full(5, 20)])
    found = np.concatenate(tokens_in_boxes(boxes, (20, 80), (2, 8)))
    assert sorted(found.tolist()) == list(range(16))


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Five regions over nine tokens: overlapping ones, one of a single token, one without any."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(9, WIDTH, generator=generator, dtype=torch.float64)
    inside = {0: [0, 1, 2], 1: [2, 3, 4, 8], 2: [5], 4: [0, 8]}
    rows = torch.tensor([row for region in inside.values() for row in region])
    regions = torch.tensor([region for region, own in inside.items() for _ in own])
    return tokens, rows, regions


def test_a_pooled_region_attends_to_its_own_tokens() -> None:
    tokens, rows, regions = pairs()
    pool = RegionPool(WIDTH, 2, device=CPU, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for parameter in pool.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    given = tokens.clone().requires_grad_()
    found = pool(given, rows, regions, 5)

    dense = tokens.clone().requires_grad_()
    mask = torch.zeros(5, 9, dtype=torch.bool)
    mask[regions, rows] = True
    key, value = (x.view(9, 2, 3) for x in F.linear(dense, pool.key_value.weight, pool.key_value.bias).chunk(2, -1))
    scores = torch.einsum("nd,tnd->nt", pool.probe.view(2, 3), key) * 3**-0.5
    weights = scores[None].masked_fill(~mask[:, None], -torch.inf).softmax(-1).nan_to_num()
    expected = pool.out(torch.einsum("rnt,tnd->rnd", weights, value).flatten(1))
    assert torch.allclose(found, expected, atol=1e-6)  # sums are fp32
    factors = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * factors).sum(), (given, *pool.parameters()))
    theirs = torch.autograd.grad((expected * factors).sum(), (dense, *pool.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


def test_the_mean_of_a_region() -> None:
    tokens, rows, regions = pairs()
    found = mean_of_regions(tokens, rows, regions, 5)
    assert torch.allclose(found[1], tokens[[2, 3, 4, 8]].mean(0).float()) and not found[3].any()


DOCUMENT = Document(
    "Big news, big\nstraße 北京 x",
    words=Boxes.of([[0, 0, 0, 9, 9, 0, 3], [0, 10, 0, 30, 9, 4, 9], [0, 31, 0, 40, 9, 10, 13],
                    [0, 0, 12, 20, 20, 14, 20], [0, 22, 12, 30, 20, 21, 23], [0, 32, 12, 36, 20, 24, 25]]),
    lines=Boxes.of([[0, 0, 0, 40, 10, 0, 13], [0, 0, 11, 40, 20, 14, 25]]),
)  # fmt: skip


def test_words_in_boxes_are_found_as_pages_are_tagged() -> None:
    find = word_labels(Vocabulary(("news", "big", "strasse", "北京", "x"), (1,) * 5))
    assert find(DOCUMENT, DOCUMENT.words) == [
        [1],
        [0],
        [1],
        [2],
        [3],
        [4],
    ]  # "x" as it stands, though no page is tagged so
    assert find(DOCUMENT, DOCUMENT.lines) == [[1, 0], [2, 3]]
    assert word_labels(Vocabulary(("nothing",), (1,)))(DOCUMENT, DOCUMENT.words) == [[]] * 6


def test_tokens_in_boxes_are_those_with_a_character_there(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(write_tokenizer(tmp_path))
    find = token_labels(tokenizer)
    ids = tokenizer.encode([DOCUMENT.text])[0]
    assert list(dict.fromkeys(token for line in find(DOCUMENT, DOCUMENT.lines) for token in line)) == [
        token for token in dict.fromkeys(ids) if token not in tokenizer.encode(["\n"])[0]
    ]
    (beijing,) = find(DOCUMENT, Boxes.of([[0, 22, 12, 30, 20, 21, 23]]))
    assert tokenizer.decode(beijing).strip() == "北京"


def read(document: Document, count: int, **section: Any) -> tuple[Any, RegionItems]:
    """Returns the inputs of `count` samples that show the document on 4 x 4 tokens, the second one unreadable."""
    items = RegionItems(
        ("pages",), RegionConfig(**section), SimpleNamespace(topology=SimpleNamespace(device=CPU), embedding_size=WIDTH,
                                                             dtype=torch.float32)
    )  # fmt: skip
    seeds = torch.arange(10, 10 + count)
    samples = Samples.of_one_source("pages", tuple(map(str, range(count))), seeds)
    samples.is_valid[1] = False
    bounds = torch.arange(count + 1, dtype=torch.int32) * 16
    grids = torch.tensor([[1, 4, 4]] * count, dtype=torch.int32)
    pack = PatchPack(torch.zeros(16 * count, 3), bounds, grids, torch.arange(count, dtype=torch.int32))
    size = np.array([[40, 40]] * (count - 1))
    windows = Windows(np.zeros_like(size), np.array([[20, 40]] * (count - 1)), size, np.zeros(count - 1, np.int32))
    folder = Path(section["vocabulary"]).parent if "vocabulary" in section else Path()
    reader = SimpleNamespace(
        readable_documents=lambda name, rows: [document] * len(rows),
        windows=lambda name, rows, seeds: windows,
        shards=lambda name: SimpleNamespace(directory=folder),
    )
    inputs = items.collate(samples, pack, reader)
    batch = Batch({"main": pack}, samples, {"head": inputs})
    assert items.labels_of(inputs).shape[0] == len(items.seeds(batch)) == len(items.rows(batch))
    return inputs, items


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    Vocabulary(("news", "big", "strasse"), (1, 1, 1)).save(tmp_path / VOCABULARY_FILE)
    return str(tmp_path / VOCABULARY_FILE)


def test_as_many_regions_of_every_sample(vocabulary: str) -> None:
    inputs, _ = read(DOCUMENT, 3, vocabulary=vocabulary, per_sample=6)
    labels = inputs.labels.view(3, 6, -1)
    assert (labels[1] == -1).all()  # unreadable
    assert sorted(labels[0, :4, 0].tolist()) == sorted(labels[2, :4, 0].tolist()) == [0, 1, 1, 2]
    assert labels[0, 4:].tolist() == labels[0, :2].tolist()  # taken again, in the same order
    assert (inputs.num_boxes, inputs.num_known) == (12, 8)
    for region, token in zip(inputs.regions.tolist(), inputs.token_rows.tolist(), strict=True):
        assert token // 16 == region // 6  # tokens of the same sample
    empty, _ = read(DOCUMENT, 3, vocabulary=vocabulary, per_sample=6, fill="empty")
    assert (empty.labels.view(3, 6, -1)[0, 4:] == -1).all()
    few, _ = read(DOCUMENT, 30, vocabulary=vocabulary, per_sample=1)
    assert len(few.labels[:, 0].unique()) == 4  # each sample draws by its seed


def test_boxes_move_with_the_picture(vocabulary: str) -> None:
    """The window stretches 20 pixels to 40, so the second line's word lies in the lower half."""
    inputs, _ = read(DOCUMENT, 2, vocabulary=vocabulary, per_sample=4, fill="empty")
    (region,) = (inputs.labels[:, 0] == 2).nonzero().flatten().tolist()
    assert inputs.token_rows[inputs.regions == region].tolist() == [8, 9, 12, 13]


def test_embeddings_are_those_of_the_regions(vocabulary: str) -> None:
    inputs, items = read(DOCUMENT, 2, vocabulary=vocabulary, per_sample=4, pooling="mean")
    tokens = torch.randn(32, 1, WIDTH, generator=torch.Generator().manual_seed(3))
    features = VisionFeatures(tokens, torch.tensor([0, 16, 32]), torch.zeros(2, 3), torch.arange(2))
    found = items.embeddings(features, None, inputs)
    inside = inputs.token_rows[inputs.regions == 2]
    assert torch.allclose(found[2], tokens[inside, 0].mean(0)) and found.shape == (8, WIDTH)
    assert items.metrics(inputs) == {"regions": (4.0, 2.0), "boxes_known": (4.0, 6.0)}
