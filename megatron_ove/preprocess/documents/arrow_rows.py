"""Rows of an image-text data set as documents: which columns hold pictures and what is said of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.arrow_files import is_sound, read_batches, read_schema, require_pyarrow
from megatron_ove.preprocess.documents.known_text import CONVERSATION_ENTRIES, plain_value
from megatron_ove.preprocess.documents.preparing import DocumentInput, PageBytes
from megatron_ove.preprocess.documents.writing import input_refused
from megatron_ove.preprocess.input_files import sample_key

_BYTES, _PATH = "bytes", "path"


@dataclass(frozen=True)
class Columns:
    """Which column holds what; "" = none.

    Attributes:
        image: pictures: a struct with bytes, binary, or a list of either.
        text: all that is written in the pictures.
        caption: a caption or a list of them.
        question: a question or a list of them.
        answer: their answers; of a list for one question the most frequent one.
        conversation: a list of what was said.
    """

    image: str
    text: str = ""
    caption: str = ""
    question: str = ""
    answer: str = ""
    conversation: str = ""

    @property
    def used(self) -> list[str]:
        """Names of the columns that are read, each once."""
        return list(dict.fromkeys(name for name in vars(self).values() if name))


def choose_columns(schema: Any, given: Mapping[str, str | None]) -> Columns:
    """Returns which columns of a `pyarrow.Schema` to read.

    Args:
        schema: of the data set's first file.
        given: what the user says, by the names of `Columns`; None = the column that is called so, and for pictures the
            first that can hold some.

    Raises:
        DataError: a column does not exist, none holds pictures, or none says anything of them.
    """
    names: list[str] = schema.names
    unknown = next((name for name in given.values() if name and name not in names), None)
    if unknown is not None:
        raise DataError(f"there is no column '{unknown}'; there are {', '.join(names)}")
    image = given.get("image") or next((name for name in names if _holds_pictures(schema.field(name).type)), None)
    if image is None or not _holds_pictures(schema.field(image).type):
        what = "no column holds" if image is None else f"the column '{image}' is {schema.field(image).type}, not"
        raise DataError(f"{what} pictures (bytes, or a struct with bytes, or lists of them); name one with --image")
    usual = {"text": ("text",), "caption": ("caption", "captions"), "question": ("question", "questions")}
    usual |= {"answer": ("answer", "answers"), "conversation": CONVERSATION_ENTRIES}
    # Whoever names a column knows what is wanted; then nothing is guessed.
    guesses = not any(given.get(role) for role in usual)
    chosen: dict[str, str] = {}
    for role, candidates in usual.items():
        guess = next((name for name in candidates if name in names and name != image), "") if guesses else ""
        chosen[role] = given.get(role) or guess
    if guesses and not (chosen["question"] and chosen["answer"]):
        chosen["question"] = chosen["answer"] = ""
    columns = Columns(image=image, **chosen)
    if bool(columns.question) != bool(columns.answer):
        raise DataError("questions need answers; give both --question and --answer")
    if columns.used == [image]:
        raise DataError(
            f"no column says what is in the pictures; there are {', '.join(names)}: name one with --text, --caption, "
            "--conversation, or --question and --answer"
        )
    return columns


def _holds_pictures(kind: Any) -> bool:
    types = require_pyarrow().types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return kind.get_field_index(_BYTES) >= 0
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


@dataclass(frozen=True)
class RowDocuments:
    """The rows of some files as documents.

    Attributes:
        files: name below the data set's folder -> path.
        columns: which are read.
    """

    files: Mapping[str, Path]
    columns: Columns

    def inputs(self) -> Iterator[DocumentInput]:
        """Yields the rows; what is wrong with a row, or with a file from some place on, is a `problem`."""
        for name, path in self.files.items():
            row = 0
            try:
                missing = [column for column in self.columns.used if column not in read_schema(path).names]
                if missing:
                    raise DataError(f"{path} has no column '{missing[0]}', which other files of the data set have")
                for batch in read_batches(path, self.columns.used):
                    # Not the batch as a whole: one of save_to_disk may have a thousand pictures.
                    is_batch_sound = is_sound(batch)
                    for place in range(batch.num_rows):
                        if is_batch_sound or is_sound(batch.slice(place, 1)):
                            yield self._input(batch, place, name, path, row)
                        else:
                            file = f"{path}/row {row}"
                            reason = f"{file} is damaged, or has a text that is not UTF-8; copy or repair the data set"
                            yield input_refused(file, reason)
                        row += 1
            except DataError as error:
                yield input_refused(str(path), str(error))

    def _input(self, batch: Any, place: int, name: str, path: Path, row: int) -> DocumentInput:
        file = f"{path}/row {row}"
        try:
            values = {column: batch.column(column)[place].as_py() for column in self.columns.used}
            pages = _pages(values[self.columns.image], file)
            record = _record(values, self.columns)
        except DataError as error:
            return input_refused(file, f"{file} {error}")
        return DocumentInput(sample_key(f"{name}/row {row}."), file, pages, record)


def _pages(value: object, file: str) -> tuple[PageBytes, ...]:
    pictures = value if isinstance(value, list) else [value]
    contents: list[bytes] = []
    for picture in pictures:
        content = picture.get(_BYTES) if isinstance(picture, Mapping) else picture
        if content is None and isinstance(picture, Mapping) and picture.get(_PATH):
            raise DataError(
                f"has of a picture only the path {str(picture[_PATH])[:200]!r}, which lies outside the data set; store "
                "the pictures in it (Dataset.cast_column with Image, then save again)"
            )
        if isinstance(content, bytes):
            contents.append(content)
        elif content is not None:
            raise DataError(f"has a picture that is {type(content).__name__}, not bytes; correct it")
    if not contents or len(contents) < len(pictures):
        raise DataError("has no picture" if not contents else f"lacks {len(pictures) - len(contents)} of its pictures")
    names = [file] if len(contents) == 1 else [f"{file}, picture {number + 1}" for number in range(len(contents))]
    return tuple(PageBytes(content, name) for content, name in zip(contents, names, strict=True))


def _record(values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Returns a row in the form of `known_text.document_of`."""
    record: dict[str, Any] = {}
    if columns.text:
        record["text"] = values[columns.text]
    if columns.caption:
        record["captions"] = values[columns.caption]
    if columns.conversation:
        record[CONVERSATION_ENTRIES[0]] = _conversation(values[columns.conversation])
    if columns.question:
        question, answer = (plain_value(values[name], name) for name in (columns.question, columns.answer))
        record["turns"] = _turns(question, answer)
    return record


def _conversation(value: object) -> object:
    """Returns a list of what was said; `datasets` stores a Sequence of entries as an entry of lists, also of parts."""
    said = _entries(value)
    if not isinstance(said, list):
        return said
    return [
        {name: _entries(one) for name, one in entry.items()} if isinstance(entry, Mapping) else entry for entry in said
    ]


def _entries(value: object) -> object:
    """Turns {"from": [a, b], "value": [c, d]} into a list of entries; anything else stays as it is."""
    if not isinstance(value, Mapping) or not all(isinstance(one, list) for one in value.values()):
        return value
    lengths = {name: len(one) for name, one in value.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise DataError(f"has a conversation of lists that differ in length ({shown}); correct it")
    return [dict(zip(value, entry, strict=True)) for entry in zip(*value.values(), strict=True)]


def _turns(question: object, answer: object) -> list[dict[str, Any]]:
    if question is None and answer is None:
        return []
    if isinstance(question, list):
        if not isinstance(answer, list) or len(answer) != len(question):
            raise DataError(f"has {len(question)} questions, but not as many answers; correct it")
        pairs: Sequence[tuple[object, object]] = list(zip(question, answer, strict=True))
    else:
        pairs = [(question, answer)]
    return [{"task": "qa", "question": one, "answer": _most_frequent(other)} for one, other in pairs]


def _most_frequent(answer: object) -> object:
    """Returns the answer; of several that people gave, the most frequent one, the first among equals."""
    given = answer if isinstance(answer, list) else [answer]
    if not given or not all(isinstance(one, str) for one in given):
        raise DataError("has a question without an answer that is a text; correct it")
    return Counter(given).most_common(1)[0][0]
