"""Texts of a document set as token ids, cached beside it: for their lengths, which a plan needs before it reads.

A cache belongs to one tokenizer: it lies in `tokens-<fingerprint>`, and another tokenizer has another fingerprint. The
texts stay the truth; a cache can be deleted and made again. It is written in pieces, each a range of samples, by as
many tasks as one likes, and memory-mapped when it is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.new_folder import new_folder
from megatron_ove.shards.arrays import load_array
from megatron_ove.shards.documents import Document
from megatron_ove.shards.format import DatasetInfo, set_mark
from megatron_ove.shards.merge import part_name
from megatron_ove.shards.shard_set import ShardSet

CACHE_FILE = "cache.json"
MADE_BY = "tools/documents/cache_tokens.py"
_VERSION = 2  # 2: names of special tokens in a text are text
Normalisation = Literal["none", "nfc"]
View = Literal["text", "turns", "captions"]
"""What lengths count: the text; questions and answers of all turns, an answer that is the text included; captions."""
_TURN_COUNTS = "turn_counts"


class Role(IntEnum):
    """What a cached text is."""

    TEXT = 0
    QUESTION = 1
    ANSWER = 2
    ANSWER_IS_TEXT = 3
    """Of a turn whose answer is the document's text: cached as nothing, read as the text."""
    CAPTION = 4


_ROLE_OF_VIEW: Mapping[str, tuple[Role, ...]] = {
    "text": (Role.TEXT,),
    "turns": (Role.QUESTION, Role.ANSWER),
    "captions": (Role.CAPTION,),
}


class TextTokenizer:
    """A tokenizer of the `tokenizers` library without the marks that a model puts around texts.

    Attributes:
        path: its tokenizer.json.
        normalisation: what is done to a text before; "nfc" = Unicode's composed form.
        fingerprint: 16 hex digits of all that decides the ids.
        vocab_size: ids are 0 .. vocab_size - 1.
    """

    def __init__(self, path: str | Path, *, normalisation: Normalisation = "none") -> None:
        """Reads a tokenizer.json, or that of a folder.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        from tokenizers import Tokenizer

        given = Path(path)
        self.path = given / "tokenizer.json" if given.is_dir() else given
        if normalisation not in get_args(Normalisation):
            raise DataError(f"the normalisation {normalisation!r} is none of {', '.join(get_args(Normalisation))}")
        try:
            content = self.path.read_bytes()
            # Two of them, which are never changed: threads of a run encode at the same time.
            self._tokenizer, self._knowing = Tokenizer.from_buffer(content), Tokenizer.from_buffer(content)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read ({error.strerror}); give a tokenizer.json or the folder that holds one"
            ) from error
        except Exception as error:  # the library raises a plain Exception for whatever is wrong with the content
            raise DataError(
                f"{self.path} is no tokenizer that the tokenizers library reads ({error}); convert it to tokenizer.json"
            ) from error
        for one in (self._tokenizer, self._knowing):
            one.no_truncation()
            one.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text
        self._knowing.encode_special_tokens = False
        self.normalisation: Normalisation = normalisation
        meaning = json.dumps([_VERSION, normalisation, json.loads(content)], sort_keys=True)
        self.fingerprint = hashlib.sha256(meaning.encode()).hexdigest()[:16]
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str], *, knows_special: bool = False) -> list[list[int]]:
        """Returns the token ids of each text.

        Args:
            texts: as they are stored.
            knows_special: whether the name of a special token in a text is that token, as in a template; else it is
                text like any other, so that no page can end its own answer.
        """
        tokenizer = self._knowing if knows_special else self._tokenizer
        texts = [self.normalise(text) for text in texts]
        return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Returns token ids of a text, and [n, 2] int64, the characters [start, stop) of it that each stands for.

        A character that takes several tokens, as in byte-level vocabularies, belongs to each of them. With a
        normalisation that changes the text they are places in the normalised one.
        """
        found = self._tokenizer.encode(self.normalise(text), add_special_tokens=False)
        return found.ids, np.array(found.offsets, dtype=np.int64).reshape(-1, 2)

    def normalise(self, text: str) -> str:
        """Returns a text as it is encoded."""
        return unicodedata.normalize("NFC", text) if self.normalisation == "nfc" else text

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, special ones left out; ids behind the vocabulary are nothing."""
        return self._tokenizer.decode([token for token in ids if token < self.vocab_size], skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its name; None = it has none such."""
        return self._tokenizer.token_to_id(token)

    @property
    def special_tokens(self) -> list[str]:
        """Names of the special tokens, by id."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for _, token in sorted(added.items()) if token.special]


def cached_texts(document: Document) -> list[tuple[Role, str, str]]:
    """Returns (role, task, text) of all that is cached of a document, in stored order."""
    found = [(Role.TEXT, "", document.text)]
    for turn in document.turns:
        found.append((Role.QUESTION, turn.task, turn.question))
        is_text = turn.answer is None
        found.append((Role.ANSWER_IS_TEXT if is_text else Role.ANSWER, turn.task, turn.answer or ""))
    return found + [(Role.CAPTION, "", caption) for caption in document.captions]


def cache_folder(directory: Path, fingerprint: str) -> Path:
    """Returns where the cache of a set and tokenizer lies."""
    return directory / f"tokens-{fingerprint}"


@dataclass(frozen=True)
class CacheInfo:
    """`cache.json`.

    Attributes:
        version: of the layout.
        fingerprint: of the tokenizer.
        tokenizer: name of its file or folder, for people.
        normalisation: of texts.
        vocab_size: of the tokenizer.
        set_mark: what the set was when it was read.
        num_samples: of the set.
        tasks: names that `tasks.npy` numbers.
    """

    version: int
    fingerprint: str
    tokenizer: str
    normalisation: str
    vocab_size: int
    set_mark: str
    num_samples: int
    tasks: tuple[str, ...]


class TokenCache:
    """An open cache.

    Attributes:
        folder: where it lies.
        info: what it is.
    """

    def __init__(self, folder: Path, info: CacheInfo) -> None:
        """Use `TokenCache.open`."""
        self.folder, self.info = folder, info
        arrays = {name: _load(folder / f"{name}.npy", kind) for name, kind in _FILES.items()}
        self._ids, self._firsts, self._first_texts = arrays["ids"], arrays["firsts"], arrays["first_texts"]
        self._roles, self._tasks = arrays["roles"], arrays["tasks"]
        count = len(self._roles)
        sizes = [len(self._firsts) - 1, len(self._tasks), int(self._first_texts[-1])]
        if len(self._first_texts) != info.num_samples + 1 or sizes != [count] * 3 or self._firsts[-1] != len(self._ids):
            raise DataError(
                f"the token cache {folder} is damaged: its files do not belong together; delete it and run {MADE_BY}"
            )

    @classmethod
    def open(cls, directory: Path, fingerprint: str) -> TokenCache:
        """Opens the cache of one set.

        Raises:
            DataError: there is none, it is damaged, or it was made of another version of the set.
        """
        folder = cache_folder(directory, fingerprint)
        count = DatasetInfo.read(directory).num_samples
        info = read_cache_info(folder)
        if info is None:
            raise DataError(
                f"{directory} has no token cache of the tokenizer {fingerprint}, by which the lengths of texts are "
                f"known; make it: python {MADE_BY} {directory} --tokenizer FOLDER"
            )
        if (info.set_mark, info.fingerprint, info.num_samples) != (set_mark(directory), fingerprint, count):
            raise DataError(
                f"the token cache {folder} was made of another version of the set, so its texts are others; delete it "
                f"and run {MADE_BY} again"
            )
        return cls(folder, info)

    def tokens(self, row: int) -> list[tuple[Role, str, np.ndarray]]:
        """Returns (role, task, [k] int32 token ids) of every text of a sample, in the order of `cached_texts`.

        An answer that is the document's text has its ids.
        """
        first, stop = int(self._first_texts[row]), int(self._first_texts[row + 1])
        bounds = self._firsts[first : stop + 1].tolist()
        try:
            roles = [Role(role) for role in self._roles[first:stop].tolist()]
            tasks = [self.info.tasks[task] for task in self._tasks[first:stop].tolist()]
        except (ValueError, IndexError) as error:
            raise DataError(
                f"the token cache {self.folder} is damaged in row {row} ({error}); delete it and run {MADE_BY}"
            ) from error
        ids = [np.asarray(self._ids[begin:end]) for begin, end in pairwise(bounds)]
        return [
            (role, task, ids[0] if role == Role.ANSWER_IS_TEXT else own)
            for role, task, own in zip(roles, tasks, ids, strict=True)
        ]

    def read_turn_counts(self) -> np.ndarray:
        """Returns the answers of each sample, [n] int32."""
        return self._read_counts(_TURN_COUNTS)

    def read_lengths(self, view: View) -> np.ndarray:
        """Returns the tokens of each sample, [n] int32; all of a view's texts together."""
        return self._read_counts(f"{view}_lengths")

    def _read_counts(self, name: str) -> np.ndarray:
        counts = np.array(_load(self.folder / f"{name}.npy", "<i4"))
        if len(counts) != self.info.num_samples:
            raise DataError(f"the token cache {self.folder} is damaged: it lacks counts; delete it and run {MADE_BY}")
        return counts


class SourceTexts:
    """The cached texts of a source, which may read several sets one after the other."""

    def __init__(self, caches: Sequence[TokenCache]) -> None:
        self._caches = tuple(caches)
        self._firsts = np.cumsum([0, *(cache.info.num_samples for cache in caches)])
        self._lengths: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, directories: Sequence[str | Path], fingerprint: str) -> SourceTexts:
        """Opens the cache of each set.

        Raises:
            DataError: one is missing, damaged or of another version of its set; one sentence a line.
        """
        caches, problems = [], []
        for directory in directories:
            try:
                caches.append(TokenCache.open(Path(directory), fingerprint))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("\n".join(problems))
        return cls(caches)

    def tokens(self, row: int) -> list[tuple[Role, str, np.ndarray]]:
        """Returns the texts of a sample, see `TokenCache.tokens`."""
        piece = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self._caches[piece].tokens(row - int(self._firsts[piece]))

    def turn_counts(self) -> np.ndarray:
        """Returns the answers of each sample, [n] int32, in memory."""
        if "turn_counts" not in self._lengths:
            self._lengths["turn_counts"] = np.concatenate([cache.read_turn_counts() for cache in self._caches])
        return self._lengths["turn_counts"]

    def lengths(self, view: View) -> np.ndarray:
        """Returns the tokens of each sample, [n] int32, in memory: 4 bytes a sample for each view that is asked for."""
        if view not in self._lengths:
            self._lengths[view] = np.concatenate([cache.read_lengths(view) for cache in self._caches])
        return self._lengths[view]


_COUNTS = (_TURN_COUNTS, *(f"{view}_lengths" for view in get_args(View)))
"""Files of a number a sample, read into memory."""
_FILES = {"ids": "<i4", "firsts": "<i8", "first_texts": "<i8", "roles": "u1", "tasks": "<u4"}


def _load(path: Path, kind: str) -> np.ndarray:
    values = load_array(path, in_memory=False, advice=f"delete its folder and run {MADE_BY} again")
    if values.dtype != np.dtype(kind) or values.ndim != 1:
        raise DataError(f"{path} holds {values.dtype}, so it is damaged; delete its folder and run {MADE_BY} again")
    return values


def read_cache_info(folder: Path) -> CacheInfo | None:
    """Returns what a cache says of itself; None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = folder / CACHE_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = CacheInfo(**{**data, "tasks": tuple(data["tasks"])})
        if type(found.num_samples) is not int or not all(isinstance(task, str) for task in found.tasks):
            raise ValueError("num_samples or tasks are of another form")
        if not (folder / f"{_TURN_COUNTS}.npy").is_file():
            raise ValueError("an earlier version made it, which did not count turns")
        return found
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete its folder and run {MADE_BY} again") from error


@dataclass(frozen=True)
class CacheCounts:
    """What a tool says of a cache that it has written.

    Attributes:
        samples: looked at.
        tokens: of all texts.
        longest: tokens of the sample with most.
        empty: samples without any token.
    """

    samples: int
    tokens: int
    longest: int
    empty: int


_JOINED_ROWS = 1 << 20
_CHUNK = 512
"""Samples whose texts are encoded in one go, on all cores."""


def write_cache(
    shards: ShardSet, tokenizer: TextTokenizer, rows: range, folder: Path, *, progress: Any = iter
) -> CacheCounts:
    """Encodes the texts of some neighbouring samples into `folder`, which appears when it is whole.

    Args:
        shards: one document set.
        tokenizer: what to encode with.
        rows: which samples.
        folder: new folder: the cache, or a piece of it.
        progress: shows how far the chunks are; called with their list.

    Raises:
        DataError: the set has no documents, or one cannot be read; names it.
    """
    if not shards.info.has_pages:
        raise DataError(f"{shards.directory} holds samples of kind {shards.info.kind}, which have no text")
    with new_folder(folder) as path:
        with (path / "ids.bin").open("wb") as stream:
            texts = _EncodedTexts(stream)
            for start in progress(range(rows.start, rows.stop, _CHUNK)):
                found = [cached_texts(shards.read_document(i)) for i in range(start, min(start + _CHUNK, rows.stop))]
                encoded = iter(tokenizer.encode([text for own in found for _, _, text in own]))
                for own in found:
                    texts.add([(role, task, next(encoded)) for role, task, _ in own])
        lengths = texts.save(path)
        info = CacheInfo(
            version=_VERSION,
            fingerprint=tokenizer.fingerprint,
            tokenizer=tokenizer.path.parent.name,
            normalisation=tokenizer.normalisation,
            vocab_size=tokenizer.vocab_size,
            set_mark=set_mark(shards.directory),
            num_samples=len(rows),
            tasks=tuple(texts.tasks),
        )
        _write_info(info, path)
    totals = np.sum(lengths, axis=0, dtype=np.int64)
    return CacheCounts(len(rows), texts.num_tokens, int(totals.max(initial=0)), int((totals == 0).sum()))


class _EncodedTexts:
    """Texts in the making: ids go to a file as they come, the rest takes some bytes a text."""

    def __init__(self, stream: BinaryIO) -> None:
        self.tasks: dict[str, int] = {"": 0}
        self._stream = stream
        self._firsts, self._first_texts = array("q", [0]), array("q", [0])
        self._roles, self._task_numbers = bytearray(), array("I")
        self._lengths = {view: array("i") for view in get_args(View)}
        self._turn_counts = array("i")

    @property
    def num_tokens(self) -> int:
        return self._firsts[-1]

    def add(self, texts: Sequence[tuple[Role, str, Sequence[int]]]) -> None:
        """Takes the texts of a sample, in the order of `cached_texts`."""
        counts = dict.fromkeys(Role, 0)
        for role, task, ids in texts:
            self._stream.write(np.array(ids, dtype="<i4").tobytes())
            self._firsts.append(self._firsts[-1] + len(ids))
            self._roles.append(role)
            self._task_numbers.append(self.tasks.setdefault(task, len(self.tasks)))
            is_text = role == Role.ANSWER_IS_TEXT
            counts[Role.ANSWER if is_text else role] += counts[Role.TEXT] if is_text else len(ids)
        self._first_texts.append(len(self._roles))
        self._turn_counts.append(sum(role in (Role.ANSWER, Role.ANSWER_IS_TEXT) for role, _, _ in texts))
        for view, roles in _ROLE_OF_VIEW.items():
            self._lengths[view].append(sum(counts[role] for role in roles))

    def save(self, folder: Path) -> list[np.ndarray]:
        """Writes everything but the ids, and the header of these; returns the lengths of each view, [n] int32."""
        lengths = {f"{view}_lengths": np.asarray(values, dtype="<i4") for view, values in self._lengths.items()}
        arrays = {
            "firsts": np.asarray(self._firsts, dtype="<i8"),
            "first_texts": np.asarray(self._first_texts, dtype="<i8"),
            "roles": np.frombuffer(bytes(self._roles), dtype="u1"),
            "tasks": np.asarray(self._task_numbers, dtype="<u4"),
            _TURN_COUNTS: np.asarray(self._turn_counts, dtype="<i4"),
            **lengths,
        }
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values)
        _finish_ids(folder, self.num_tokens)
        return list(lengths.values())


def _write_info(info: CacheInfo, folder: Path) -> None:
    (folder / CACHE_FILE).write_text(json.dumps(asdict(info), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _finish_ids(folder: Path, count: int) -> None:
    """Puts the header before ids that were written as they came."""
    header = {"descr": "<i4", "fortran_order": False, "shape": (count,)}
    with (folder / "ids.npy").open("wb") as stream, (folder / "ids.bin").open("rb") as content:
        np.lib.format.write_array_header_1_0(stream, header)
        shutil.copyfileobj(content, stream)
    (folder / "ids.bin").unlink()


def join_cache(shards: ShardSet, fingerprint: str, count: int) -> CacheInfo:
    """Joins the pieces that `count` tasks have written into the cache, and removes them.

    Raises:
        DataError: a piece is missing, damaged, or of another version of the set.
    """
    folder = cache_folder(shards.directory, fingerprint)
    there = read_cache_info(folder)
    if there is not None and there.set_mark == set_mark(shards.directory):
        return there
    pieces = [pieces_folder(folder) / part_name(number, count) for number in range(count)]
    infos = []
    for number, piece in enumerate(pieces):
        info = read_cache_info(piece)
        if info is None:
            raise DataError(f"{piece} is missing; run its task (--task {number + 1}/{count}), then join again")
        if info.set_mark != set_mark(shards.directory):
            raise DataError(f"{piece} was made of another version of the set; delete it, and run its task again")
        infos.append(info)
    found = sum(info.num_samples for info in infos)
    if found != len(shards) or {info.fingerprint for info in infos} != {fingerprint}:
        raise DataError(
            f"the pieces below {pieces_folder(folder)} have {found} of the {len(shards)} samples of "
            f"{shards.directory}, or are of several tokenizers; delete them, and run all tasks again"
        )
    tasks = tuple(dict.fromkeys(task for info in infos for task in info.tasks))
    with new_folder(folder) as path:
        for name, kind in {**_FILES, **dict.fromkeys(_COUNTS, "<i4")}.items():
            _join_file(path / f"{name}.npy", np.dtype(kind), list(_pieces(name, pieces, infos, tasks)))
        info = CacheInfo(**{**asdict(infos[0]), "num_samples": sum(i.num_samples for i in infos), "tasks": tasks})
        _write_info(info, path)
    shutil.rmtree(pieces_folder(folder))
    return info


def pieces_folder(folder: Path) -> Path:
    """Returns where the pieces of a cache lie until they are joined."""
    return folder.with_name(f"{folder.name}.pieces")


def _pieces(
    name: str, pieces: Sequence[Path], infos: Sequence[CacheInfo], tasks: Sequence[str]
) -> Iterator[np.ndarray]:
    offset, number_of = 0, {task: number for number, task in enumerate(tasks)}
    for number, (piece, info) in enumerate(zip(pieces, infos, strict=True)):
        values = load_array(piece / f"{name}.npy", in_memory=False, advice="delete its folder and run its task again")
        if name in ("firsts", "first_texts"):  # ends of what comes before; each piece begins with a 0
            yield np.asarray(values[1 if number else 0 :]) + offset
            offset += int(values[-1])
        elif name == "tasks":
            yield np.array([number_of[task] for task in info.tasks], dtype="<u4")[values]
        else:
            yield values


def _join_file(path: Path, dtype: np.dtype[Any], pieces: Sequence[np.ndarray]) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (sum(map(len, pieces)),)}
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for piece in pieces:
            for start in range(0, len(piece), _JOINED_ROWS):
                stream.write(piece[start : start + _JOINED_ROWS].astype(dtype).tobytes())
