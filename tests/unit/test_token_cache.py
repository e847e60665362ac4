"""Texts as cached token ids: whole or by tasks, of one tokenizer and one version of a set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.token_cache import (
    Role,
    SourceTexts,
    TextTokenizer,
    TokenCache,
    cache_folder,
    cached_texts,
    join_cache,
    pieces_folder,
    write_cache,
)
from tests.support.documents import write_documents, write_tokenizer
from tests.support.id_shards import write_id_shard_set
from tests.support.tool_scripts import run_script

COUNT = 15


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return write_documents(folder / "set", range(COUNT)), write_tokenizer(folder / "tokenizer")


@pytest.fixture
def copied(made: tuple[Path, Path], tmp_path: Path) -> tuple[ShardSet, TextTokenizer]:
    return ShardSet.open(shutil.copytree(made[0], tmp_path / "set")), TextTokenizer(made[1])


def write_whole(shards: ShardSet, tokenizer: TextTokenizer) -> Path:
    folder = cache_folder(shards.directory, tokenizer.fingerprint)
    write_cache(shards, tokenizer, range(len(shards)), folder)
    return folder


def test_every_text_is_cached_as_the_tokenizer_writes_it(copied: tuple[ShardSet, TextTokenizer]) -> None:
    shards, tokenizer = copied
    folder = cache_folder(shards.directory, tokenizer.fingerprint)
    counts = write_cache(shards, tokenizer, range(COUNT), folder)
    cache = TokenCache.open(shards.directory, tokenizer.fingerprint)
    lengths = {view: cache.read_lengths(view) for view in ("text", "turns", "captions")}
    total = 0
    for row in range(COUNT):
        document = shards.read_document(row)
        expected = cached_texts(document)
        found = cache.tokens(row)
        assert [(role, task) for role, task, _ in found] == [(role, task) for role, task, _ in expected]
        for (role, _, ids), (_, _, text) in zip(found, expected, strict=True):
            text = document.text if role == Role.ANSWER_IS_TEXT else text
            assert ids.tolist() == tokenizer.encode([text])[0]
            total += len(ids) * (role != Role.ANSWER_IS_TEXT)
        pairs = zip(document.turns, document.answers, strict=True)
        turns = [text for turn, answer in pairs for text in (turn.question, answer)]
        for view, texts in {"text": [document.text], "turns": turns, "captions": document.captions}.items():
            assert lengths[view][row] == sum(len(ids) for ids in tokenizer.encode(list(texts))), (row, view)
    assert (counts.samples, counts.tokens) == (COUNT, total)
    whole = np.sum(list(lengths.values()), axis=0)
    assert (counts.longest, counts.empty) == (whole.max(), (whole == 0).sum())


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_pieces_of_tasks_make_the_same_cache(copied: tuple[ShardSet, TextTokenizer], count: int) -> None:
    shards, tokenizer = copied
    folder = write_whole(shards, tokenizer)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    for number in range(count):
        arguments = [shards.directory, "--tokenizer", tokenizer.path, "--task", f"{number + 1}/{count}"]
        run_script("documents/cache_tokens.py", *arguments)
    run_script("documents/cache_tokens.py", shards.directory, "--tokenizer", tokenizer.path, "--join", count)
    joined = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert json.loads(joined.pop("cache.json"))["num_samples"] == json.loads(whole.pop("cache.json"))["num_samples"]
    assert set(joined) == set(whole)
    cache = TokenCache.open(shards.directory, tokenizer.fingerprint)
    assert np.array_equal(cache.read_lengths("turns"), np.load(folder / "turns_lengths.npy"))
    assert {name for name in whole if whole[name] != joined[name]} <= {"tasks.npy"}, "tasks may be numbered otherwise"
    assert not pieces_folder(folder).exists()


def test_another_tokenizer_or_normalisation_has_another_cache(
    copied: tuple[ShardSet, TextTokenizer], tmp_path: Path
) -> None:
    shards, tokenizer = copied
    composed = TextTokenizer(tokenizer.path, normalisation="nfc")
    assert composed.fingerprint != tokenizer.fingerprint
    assert composed.encode(["cafe\u0301"]) == tokenizer.encode(["café"]) != tokenizer.encode(["cafe\u0301"])
    respaced = tmp_path / "tokenizer.json"
    respaced.write_text(json.dumps(json.loads(tokenizer.path.read_text()), indent=3))
    assert TextTokenizer(respaced).fingerprint == tokenizer.fingerprint, "the meaning counts, not the form"
    write_whole(shards, tokenizer)
    with pytest.raises(DataError, match=r"has no token cache of the tokenizer [0-9a-f]{16}, by which .* make it:"):
        TokenCache.open(shards.directory, composed.fingerprint)


def test_a_cache_of_another_version_of_the_set_is_refused(copied: tuple[ShardSet, TextTokenizer]) -> None:
    shards, tokenizer = copied
    write_whole(shards, tokenizer)
    caches = cache_folder(shards.directory, tokenizer.fingerprint)
    moved = shutil.move(caches, shards.directory.with_name("kept"))
    shutil.rmtree(shards.directory)
    write_documents(shards.directory, range(1, COUNT + 1))
    shutil.move(moved, caches)
    with pytest.raises(DataError, match="was made of another version of the set, so its texts are others; delete it"):
        TokenCache.open(shards.directory, tokenizer.fingerprint)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / "ids.npy").write_bytes(b"x"), r"ids\.npy is missing or unreadable"),
        (lambda folder: (folder / "roles.npy").unlink(), r"roles\.npy is missing or unreadable"),
        (lambda folder: (folder / "cache.json").write_text("{"), r"cache\.json cannot be read"),
        (lambda folder: np.save(folder / "firsts.npy", np.zeros(3, "<i8")), "is damaged: its files do not belong"),
        (lambda folder: np.save(folder / "roles.npy", np.zeros(3)), r"roles\.npy holds float64, so it is damaged"),
    ],
)
def test_a_damaged_cache_is_a_sentence(copied: tuple[ShardSet, TextTokenizer], damage, text: str) -> None:
    shards, tokenizer = copied
    damage(write_whole(shards, tokenizer))
    with pytest.raises(DataError, match=text):
        TokenCache.open(shards.directory, tokenizer.fingerprint)


def test_mistakes_with_tokenizers_are_sentences(copied: tuple[ShardSet, TextTokenizer], tmp_path: Path) -> None:
    shards, tokenizer = copied
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read \(No such file"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match="is no tokenizer that the tokenizers library reads"):
        TextTokenizer(tmp_path)
    images = ShardSet.open(write_id_shard_set(tmp_path / "images", "image", 2))
    with pytest.raises(DataError, match="holds samples of kind image, which have no text"):
        write_cache(images, tokenizer, range(2), tmp_path / "cache")
    write_cache(shards, tokenizer, range(5), pieces_folder(cache_folder(shards.directory, "f")) / "00000-of-00002")
    with pytest.raises(DataError, match=r"00001-of-00002 is missing; run its task \(--task 2/2\), then join again"):
        join_cache(shards, "f", 2)


def test_a_source_of_several_sets_reads_their_caches(tmp_path: Path, made: tuple[Path, Path]) -> None:
    tokenizer = TextTokenizer(made[1])
    folders = [write_documents(tmp_path / "a", range(4)), write_documents(tmp_path / "b", range(4, 9))]
    for folder in folders:
        write_whole(ShardSet.open(folder), tokenizer)
    texts = SourceTexts.open(folders, tokenizer.fingerprint)
    whole = ShardSet.open_all(folders)
    for row in (0, 3, 4, 8):
        assert texts.tokens(row)[0][2].tolist() == tokenizer.encode([whole.read_document(row).text])[0]
    assert texts.lengths("text").tolist() == [
        len(tokenizer.encode([whole.read_document(row).text])[0]) for row in range(9)
    ]
    with pytest.raises(DataError, match="has no token cache"):
        SourceTexts.open([folders[0], made[0]], tokenizer.fingerprint)
