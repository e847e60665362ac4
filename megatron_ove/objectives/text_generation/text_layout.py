"""How the texts of samples are laid out for the decoder: image tokens, questions, answers, and which tokens count.

Everything here is done on the host, in a loader's thread, from cached token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_ove.config.text_generation import TextGenerationConfig, TextView
from megatron_ove.errors import ConfigError
from megatron_ove.parallel.random import stateless_seed
from megatron_ove.shards.token_cache import Role, TextTokenizer

CachedTexts = Sequence[tuple[Role, str, np.ndarray]]
"""(role, task, token ids) of every text of a sample, as a token cache has them."""


@dataclass(frozen=True)
class Question:
    """One turn as token ids.

    Attributes:
        question: before the answer, instruction and template included.
        answer: without an end token.
        place: of the answer among the sample's texts.
    """

    question: list[int]
    answer: list[int]
    place: int


@dataclass(frozen=True)
class TextLayout:
    """A sample's text without its image tokens, which come behind `before`.

    Attributes:
        before: tokens before the image tokens.
        rest: tokens behind them.
        is_answer: [len(rest)] bool, which of them have a loss.
        answers: of each answer, where it begins in `rest`, and its place among the sample's texts.
        num_lost: tokens that were cut.
    """

    before: list[int]
    rest: np.ndarray
    is_answer: np.ndarray
    answers: list[tuple[int, int]]
    num_lost: int


@cache
def tokenizer_at(path: str, normalisation: str) -> TextTokenizer:
    """Returns a tokenizer; each is read once."""
    return TextTokenizer(path, normalisation=normalisation)  # type: ignore[arg-type]


class TextTemplates:
    """The texts around answers as token ids.

    Attributes:
        end_token: id of what ends an answer.
    """

    def __init__(self, config: TextGenerationConfig, tokenizer: TextTokenizer) -> None:
        """Encodes them.

        Raises:
            ConfigError: the end token is none of the tokenizer's.
        """
        template = config.template
        names = ("before_images", "after_images", "before_question", "before_answer")
        encoded = tokenizer.encode([getattr(template, name) for name in names], knows_special=True)
        self.before_images, self.after_images, self.before_question, self.before_answer = encoded
        end_token = tokenizer.token_id(template.end_token)
        if end_token is None or template.end_token not in tokenizer.special_tokens:
            known = ", ".join(tokenizer.special_tokens[:8]) or "none"
            raise ConfigError(
                f"template.end_token = {template.end_token!r} is no special token of {tokenizer.path} (which has "
                f"{known}), so answers would not end, or end in the middle of a text; name one of them"
            )
        self.end_token = end_token
        self._instructions = dict(
            zip(
                config.instructions,
                tokenizer.encode(list(config.instructions.values()), knows_special=True),
                strict=True,
            )
        )
        self._around = len(self.before_question) + len(self.before_answer) + 1

    def overhead_of(self, view: TextView) -> tuple[int, int]:
        """Returns the most tokens that a sample has besides its texts: of the sample, and of each turn."""
        own = {"text": ["ocr"], "captions": ["caption"]}.get(view, list(self._instructions))
        longest = max((len(self.instruction_of(task)) for task in own), default=0)
        return len(self.before_images) + len(self.after_images), self._around + longest

    def instruction_of(self, task: str) -> list[int]:
        """Returns what is asked where a text of this task has no question."""
        return self._instructions.get(task, [])

    def question_of(self, task: str, question: Sequence[int]) -> list[int]:
        """Returns what stands before an answer."""
        asked = list(question) or self.instruction_of(task)
        return [*self.before_question, *asked, *self.before_answer]


def questions_of(texts: CachedTexts, view: TextView, templates: TextTemplates, seed: int) -> list[Question]:
    """Returns the turns that a sample teaches; [] = it has nothing to be written.

    Args:
        texts: of the sample.
        view: which of them.
        templates: what stands around them.
        seed: of the sample, by which one of several captions is drawn.
    """
    if view == "turns":
        found, asked = [], np.empty(0, dtype=np.int32)
        for place, (role, task, ids) in enumerate(texts):
            if role == Role.QUESTION:
                asked = ids
            elif role in (Role.ANSWER, Role.ANSWER_IS_TEXT) and len(ids):
                found.append(Question(templates.question_of(task, asked.tolist()), ids.tolist(), place))
        return found
    role, task = (Role.TEXT, "ocr") if view == "text" else (Role.CAPTION, "caption")
    own = [place for place, (one, _, ids) in enumerate(texts) if one == role and len(ids)]
    if not own:
        return []
    place = own[stateless_seed(seed, "caption") % len(own)]
    return [Question(templates.question_of(task, ()), texts[place][2].tolist(), place)]


def lay_out(questions: Sequence[Question], templates: TextTemplates, most: int) -> TextLayout:
    """Returns a sample's text, cut behind `most` tokens that are no image tokens.

    An answer that is cut has no end token: it has not ended.
    """
    rest, is_answer = list(templates.after_images), [False] * len(templates.after_images)
    places = []
    for one in questions:
        rest += one.question
        is_answer += [False] * len(one.question)
        places.append((len(rest), one.place))
        rest += [*one.answer, templates.end_token]
        is_answer += [True] * (len(one.answer) + 1)
    room = max(0, most - len(templates.before_images))
    return TextLayout(
        before=list(templates.before_images),
        rest=np.array(rest[:room], dtype=np.int64),
        is_answer=np.array(is_answer[:room], dtype=bool),
        answers=[(start, place) for start, place in places if start < room],
        num_lost=max(0, len(rest) - room),
    )


def longest_text(
    config: TextGenerationConfig, lengths: np.ndarray, turns: np.ndarray, overhead: tuple[int, int]
) -> np.ndarray:
    """Returns the most tokens besides image tokens that samples can have, [n] int64.

    Args:
        config: of the objective.
        lengths: [n], tokens of the texts that are read.
        turns: [n], answers of each sample.
        overhead: of `TextTemplates`.
    """
    whole = lengths.astype(np.int64) + overhead[0] + turns.astype(np.int64) * overhead[1]
    return np.minimum(whole, config.max_text_tokens)
