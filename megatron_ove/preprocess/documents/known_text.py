"""What is known of a picture, in the forms in which people write it down -> a `Document`.

A record is an object with any of: `text` (all that is written there), `caption` or `captions`, `turns` (as documents
have them), boxes `words`, `lines`, `characters`, and a conversation under `conversations`, `messages` or `texts`. Other
entries are not read, and are named to whoever asks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.shards.documents import BOX_UNITS, MAX_DOCUMENT_BYTES, Document

CAPTION_SUFFIX, RECORD_SUFFIX = ".txt", ".json"
TEXT_SUFFIXES = (CAPTION_SUFFIX, RECORD_SUFFIX)
"""Of files that say something about a picture."""
CONVERSATION_ENTRIES = ("conversations", "messages", "texts")
"""What a conversation is called in data sets at large."""
_ASKING, _ANSWERING, _LEFT_OUT = ("human", "user"), ("gpt", "assistant", "model"), ("system",)
_PICTURE_MARKS = ("<image>", "<|image|>")
"""Where conversations say that the picture comes; here it always comes first."""
_PICTURE_PARTS = ("image", "image_url", "input_image")
"""What the picture is called among the parts of what was said."""
_READ = ("text", "caption", "captions", "turns", *CONVERSATION_ENTRIES, *BOX_UNITS)


@dataclass(frozen=True)
class KnownText:
    """A file that says something about a picture.

    Attributes:
        name: as shown in sentences; its suffix says what it is: ".txt" a caption, ".json" a record.
        content: its bytes, or where they are.
    """

    name: str
    content: bytes | Path

    def read(self) -> bytes:
        """Returns the bytes; raises `DataError` if they cannot be read or are more than a document may have."""
        if isinstance(self.content, bytes):
            return self.content
        try:
            with self.content.open("rb") as stream:
                content = stream.read(MAX_DOCUMENT_BYTES + 1)
        except OSError as error:
            raise DataError(f"{self.name} cannot be read ({error.strerror}); check its permissions") from error
        if len(content) > MAX_DOCUMENT_BYTES:
            raise DataError(f"{self.name} has more than {MAX_DOCUMENT_BYTES} bytes, which is no text of a picture")
        return content


@dataclass(frozen=True)
class Known:
    """A document, and the names of the entries that were not read."""

    document: Document
    ignored: tuple[str, ...] = ()


def document_of_texts(texts: Sequence[KnownText]) -> Known:
    """Returns what files beside a picture say together: each ".txt" is a caption, a ".json" is a record.

    Raises:
        DataError: one of them cannot be used, there are two records, or nothing is said.
    """
    record: Mapping[str, Any] = {}
    captions = [_caption(text) for text in texts if not text.name.lower().endswith(RECORD_SUFFIX)]
    records = [text for text in texts if text.name.lower().endswith(RECORD_SUFFIX)]
    if len(records) > 1:
        raise DataError(f"both {records[0].name} and {records[1].name} are there, but one record is all; remove one")
    for text in records:
        record = _parse(text)
    try:
        return document_of(record, captions=captions)
    except DataError as error:
        names = " and ".join(text.name for text in texts) or "what is known"
        raise DataError(f"{names}: {error}") from error


def document_of(record: Mapping[str, Any], *, captions: Sequence[str] = ()) -> Known:
    """Returns the document that a record describes.

    Args:
        record: see the module; None and "" count as not there, and bytes as the text that they are in UTF-8. Turns
            whose answer is blank are left out, and are among the entries that were not read.
        captions: further ones, which come first.

    Raises:
        DataError: an entry is of another form, or nothing is said; the sentence goes behind a name and a colon.
    """
    present = {name: value for name, value in record.items() if value is not None and value != ""}
    for name in present.keys() & set(_READ):
        try:
            present[name] = plain_value(present[name], name)
        except DataError as error:
            raise DataError(f"it {error}") from error
    all_captions = [
        *_captions(list(captions)),
        *_captions(present.pop("caption", [])),
        *_captions(present.pop("captions", [])),
    ]
    turns: list[dict[str, Any]] = []
    ignored: list[str] = []
    for name in ("turns", *CONVERSATION_ENTRIES):
        value = present.pop(name, [])
        if name == "turns" and _are_turns(value):
            turns += value
            continue
        found, left_out = turns_of_conversation(value, name)
        turns += found
        ignored += [f"{name} of a system"] * left_out
    data = {name: present.pop(name) for name in ("text", *BOX_UNITS) if name in present}
    if isinstance(data.get("text"), str) and not data["text"].strip():
        data["text"] = ""
    data["captions"] = list(dict.fromkeys(all_captions))
    data["turns"] = turns
    # What comes from a table or a data set is judged just as a document's own file is. Only ASCII is written, since
    # half of a surrogate pair has no other form in which it reaches the check.
    document = Document.decode(json.dumps(data).encode("ascii"))
    turns_kept = tuple(turn for turn, answer in zip(document.turns, document.answers, strict=True) if answer.strip())
    ignored += ["turns without an answer"] * (len(document.turns) - len(turns_kept))
    document = dataclasses.replace(document, turns=turns_kept)
    if not (document.text or document.captions or document.turns):
        raise DataError("it has no text, no caption and no turn, so there is nothing to learn from the picture")
    return Known(document, (*ignored, *map(str, present)))


def plain_value(value: Any, name: str) -> Any:
    """Returns a value as JSON could hold it: bytes are texts in UTF-8, and nothing else is made a text.

    Args:
        value: from JSON, or of a table, which has further types.
        name: of its entry, for sentences.

    Raises:
        DataError: bytes are not UTF-8, or it holds a date or the like; the sentence goes behind what has the entry.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, list | tuple):
            return [plain_value(one, name) for one in value]
        if isinstance(value, Mapping):
            return {str(key): plain_value(one, name) for key, one in value.items()}
    except UnicodeDecodeError as error:
        raise DataError(f"has bytes in {name} that are not UTF-8 ({error.reason}); store texts as UTF-8") from error
    except RecursionError:
        raise DataError(f"has {name} nested without end; correct it") from None
    raise DataError(f"has a {type(value).__name__} in {name} ({str(value)[:40]}), which is no text; correct it")


def turns_of_conversation(value: object, name: str) -> tuple[list[dict[str, Any]], int]:
    """Returns the questions and answers of a conversation as `turns` of a document, and how many entries are left out.

    Args:
        value: a list of {"from" or "role", "value" or "content"}, question and answer in turn, where a content is a
            text or a list of {"type": "text", "text"}; or a list of {"user", "assistant"}.
        name: of the entry, for sentences.

    Raises:
        DataError: it has another form. Entries of a system, which says how to behave, are left out.
    """
    said: list[tuple[bool, str]] = []
    left_out = 0
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise DataError(f"it has {name} = {_shown(value)}, which is no list of what was said; correct it")
    for place, entry in enumerate(value):
        if "user" in entry and "assistant" in entry:
            said += [(True, _content(entry["user"])), (False, _content(entry["assistant"]))]
            continue
        role, content = entry.get("from", entry.get("role")), entry.get("value", entry.get("content"))
        if role in _LEFT_OUT:
            left_out += 1
        elif role in _ASKING or role in _ANSWERING:
            said.append((role in _ASKING, _content(content)))
        else:
            raise DataError(
                f"it has {name}[{place}] = {_shown(entry)}, said neither by {', '.join(_ASKING)} nor by "
                f"{', '.join(_ANSWERING)}; correct it"
            )
    if [asks for asks, _ in said] != [True, False] * (len(said) // 2):
        raise DataError(f"its {name} are no questions with an answer each; correct them")
    pairs = zip(said[::2], said[1::2], strict=True)
    return [{"task": "qa", "question": question, "answer": answer} for (_, question), (_, answer) in pairs], left_out


def _caption(text: KnownText) -> str:
    try:
        return text.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{text.name} is not UTF-8; save it as UTF-8") from error


def _parse(text: KnownText) -> Mapping[str, Any]:
    try:
        record = json.loads(text.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # the latter of what is nested without end
        raise DataError(f"{text.name} is no JSON in UTF-8 ({error}); write it again") from error
    if not isinstance(record, Mapping):
        raise DataError(f"{text.name} holds {_shown(record)}, but an object like {{'caption': '...'}} is needed")
    return record


def _captions(value: object) -> list[str]:
    captions = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
    for one in captions:
        if not isinstance(one, str):
            raise DataError(f"it has the caption {_shown(one)}, which is no text; correct it")
    return [one.strip() for one in captions if one.strip()]


def _are_turns(value: object) -> bool:
    """Whether it has the form of a document's own turns; else it may be a conversation."""
    return isinstance(value, list) and all(isinstance(turn, Mapping) and "answer" in turn for turn in value)


def _content(value: object) -> str:
    """Returns the text of what was said, without the mark of the picture."""
    if isinstance(value, list):
        value = "\n".join(_text_part(part) for part in value if not _is_picture(part))
    if not isinstance(value, str):
        raise DataError(f"somebody said {_shown(value)}, which is no text; correct it")
    for mark in _PICTURE_MARKS:
        value = value.replace(mark, "")
    return value.strip()


def _is_picture(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _PICTURE_PARTS


def _text_part(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise DataError(
            f'somebody said {_shown(part)}, which is neither {{"type": "text", "text": ...}} nor a picture; correct it'
        )
    return text


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
