"""What a decoder is given of a sample's texts: places, what counts, what is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ove.batch import PatchPack
from megatron_ove.config.text_generation import BridgeConfig, TextGenerationConfig
from megatron_ove.errors import ConfigError
from megatron_ove.objectives.text_generation.text_layout import (
    TextTemplates,
    lay_out,
    longest_text,
    questions_of,
    tokenizer_at,
)
from megatron_ove.objectives.text_generation.text_pack import build_text_pack
from megatron_ove.shards.documents import Document, Turn
from megatron_ove.shards.token_cache import Role, TextTokenizer, cached_texts
from tests.support.documents import write_tokenizer

DECODER = {"kind": "llama", "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 16}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return tokenizer_at(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))), "none")


def section(tokenizer: TextTokenizer, **fields: Any) -> TextGenerationConfig:
    own = {"kind": "text_generation", "source": "d", "tokenizer": str(tokenizer.path), "decoder": DECODER}
    return TextGenerationConfig.model_validate({**own, **fields})


def cached(tokenizer: TextTokenizer, document: Document) -> list[tuple[Role, str, np.ndarray]]:
    """As a token cache has a document's texts."""
    texts = [(role, task, document.text if role == Role.ANSWER_IS_TEXT else text)
             for role, task, text in cached_texts(document)]  # fmt: skip
    return [(role, task, np.array(tokenizer.encode([text])[0], dtype=np.int32)) for role, task, text in texts]


def laid_out(tokenizer: TextTokenizer, document: Document, most: int = 100, seed: int = 0, **fields: Any) -> Any:
    config = section(tokenizer, **fields)
    templates = TextTemplates(config, tokenizer)
    return lay_out(questions_of(cached(tokenizer, document), config.view_of("d"), templates, seed), templates, most)


def shown(tokenizer: TextTokenizer, layout: Any) -> tuple[str, str]:
    """Returns the text behind the pictures, and what of it has a loss; | is the end token."""
    end = tokenizer.token_id("<|endoftext|>")

    def text(ids: list[int]) -> str:
        parts, own = [], []
        for token in [*ids, -1]:
            if token in (end, -1):
                parts.append(tokenizer.decode(own))
                own = []
            else:
                own.append(token)
        return "|".join(parts)

    return text(layout.rest.tolist()), text(layout.rest[layout.is_answer].tolist())


TURNS = Document("reading", (Turn("ocr", "", None), Turn("qa", "a?", "café"), Turn("qa", "b?", "")), ("a", "東京"))


def test_text_turns_and_captions(tokenizer: TextTokenizer) -> None:
    around = {"template": {"after_images": ">", "before_question": "Q", "before_answer": "A"}}
    read = {"instructions": {"ocr": "read", "caption": "say"}}
    assert shown(tokenizer, laid_out(tokenizer, TURNS, **around, **read)) == (">QreadAreading|", "reading|")
    turns = laid_out(tokenizer, TURNS, texts="turns", **around, **read)
    assert shown(tokenizer, turns) == (">QreadAreading|Qa?Acafé|", "reading|café|")  # an empty answer teaches nothing
    found = {shown(tokenizer, laid_out(tokenizer, TURNS, texts="captions", seed=seed, **read)) for seed in range(20)}
    assert found == {("saya|", "a|"), ("say東京|", "東京|")}
    assert len(laid_out(tokenizer, Document("")).rest) == 0 or not laid_out(tokenizer, Document("")).is_answer.any()


def test_a_special_token_on_a_page_is_text_and_in_a_template_it_is_the_token(tokenizer: TextTokenizer) -> None:
    end = tokenizer.token_id("<|endoftext|>")
    layout = laid_out(tokenizer, Document("a<|endoftext|>a"), template={"after_images": "<|endoftext|>"})
    assert (layout.rest == end).nonzero()[0].tolist() == [0, len(layout.rest) - 1]
    assert tokenizer.decode(layout.rest.tolist()) == "a<|endoftext|>a"


def test_what_is_cut_has_no_end_and_is_counted(tokenizer: TextTokenizer) -> None:
    whole = laid_out(tokenizer, TURNS, texts="turns", template={"before_images": "a"})
    size = len(whole.before) + len(whole.rest)
    for most in range(1, size + 2):
        cut = laid_out(tokenizer, TURNS, most, texts="turns", template={"before_images": "a"})
        kept = min(size, most)
        assert len(cut.before) + len(cut.rest) == max(kept, len(cut.before))
        assert cut.num_lost == size - kept and cut.rest.tolist() == whole.rest[: len(cut.rest)].tolist()
        assert all(start < len(cut.rest) for start, _ in cut.answers)


@pytest.mark.parametrize("texts", ["text", "turns", "captions"])
def test_no_text_is_longer_than_it_was_planned(tokenizer: TextTokenizer, texts: str) -> None:
    """Else a microbatch would have more tokens than it has room for."""
    config = section(tokenizer, texts=texts, max_text_tokens=12, instructions={"ocr": "read", "caption": "it"},
                     template={"before_images": "a", "after_images": "a a", "before_answer": "A"})  # fmt: skip
    templates = TextTemplates(config, tokenizer)
    roles = {"text": (Role.TEXT,), "turns": (Role.QUESTION, Role.ANSWER, Role.ANSWER_IS_TEXT)}.get(
        texts, (Role.CAPTION,)
    )
    for count in range(4):
        document = Document("reading a " * count, TURNS.turns[:count], TURNS.captions[:count])
        own = cached(tokenizer, document)
        length = sum(len(ids) for role, _, ids in own if role in roles)
        turns = len(document.turns) if texts == "turns" else 1
        most = longest_text(config, np.array([length]), np.array([turns]), templates.overhead_of(config.view_of("d")))[
            0
        ]
        for seed in range(3):
            layout = lay_out(questions_of(own, config.view_of("d"), templates, seed), templates, config.max_text_tokens)
            assert len(layout.before) + len(layout.rest) <= most <= 12


def test_an_end_token_that_is_not_there_is_a_sentence(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ConfigError) as error:
        TextTemplates(section(tokenizer, template={"end_token": "</s>"}), tokenizer)
    assert "template.end_token = '</s>' is no special token of" in str(error.value)
    assert "(which has <|endoftext|>), so answers would not end" in str(error.value)
    with pytest.raises(ConfigError, match=r"template\.end_token = 'a' is no special token of"):
        TextTemplates(section(tokenizer, template={"end_token": "a"}), tokenizer)


def pack_of(lengths: list[int], sample: list[int]) -> PatchPack:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    grids = torch.tensor([[1, 1, length] for length in lengths], dtype=torch.int32)
    places = torch.zeros(int(bounds[-1]) + 3, 3, dtype=torch.int32)
    return PatchPack(places, bounds, grids, torch.tensor(sample, dtype=torch.int32))


def test_a_pack_says_what_of_the_encoder_goes_where(tokenizer: TextTokenizer) -> None:
    """Sample 0 has two pictures, sample 1 is of nobody, sample 2 has a shorter text."""
    pack = pack_of([2, 3, 5, 1], [0, 0, 1, 2])
    layouts = [
        (0, laid_out(tokenizer, Document("a reading"), template={"before_images": "aa"})),
        (2, laid_out(tokenizer, Document("a"))),
    ]
    found = build_text_pack(layouts, pack, BridgeConfig(), filler=9, multiple=8, device=torch.device("cpu"))
    assert found.order == [1, 0]  # the shorter first
    assert found.bridge_rows.tolist() == [10, 0, 1, 2, 3, 4] and found.picture_lengths == [1, 2, 3]
    bounds, ids = found.cu_seqlens.tolist(), found.token_ids.tolist()
    before = len(layouts[0][1].before)
    first = bounds[1] + before
    assert found.image_slots.tolist() == [0, *range(first, first + 5)] and before >= 1
    assert len(ids) % 8 == 0 and set(ids[bounds[-1] :]) <= {9}
    end = tokenizer.token_id("<|endoftext|>")
    answers = [[ids[row + 1] for row in found.predicting.tolist() if a <= row < b] for a, b in pairwise(bounds)]
    assert [tokenizer.decode(own) for own in answers] == ["a", "a reading"] and all(own[-1] == end for own in answers)
    assert found.predicting[0] == 0  # the last image token predicts the first letter


def test_a_pack_without_texts_is_padding(tokenizer: TextTokenizer) -> None:
    for bridge in (BridgeConfig(), BridgeConfig(kind="pixel_shuffle")):
        found = build_text_pack([], pack_of([2], [0]), bridge, filler=9, multiple=4, device=torch.device("cpu"))
        assert found.token_ids.tolist() == [9] * 4 and found.cu_seqlens.tolist() == [0]
        assert not len(found.predicting) and not len(found.image_slots) and not len(found.bridge_rows)
