"""Small document sets: noise pages with a marked place, and texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_ove.shards.documents import Boxes, Document, Turn
from megatron_ove.shards.writer import ShardWriter
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary
from tests.support.id_shards import encode, id_picture

WORDS = ("alpha", "Straße", "東京", "reading", "a", "transformer", "café", "नमस्ते")


def text_of(row: int) -> str:
    """Returns the text of a document: some words, none of every seventh."""
    if row % 7 == 6:
        return ""
    return " ".join(WORDS[(row * 5 + i) % len(WORDS)] for i in range(1 + row % 5))


def document_of(row: int, num_pages: int) -> Document:
    """Returns what is written in a document."""
    text = text_of(row)
    boxes = Boxes.of([[row % num_pages, 2, 3, 20, 12, 0, len(text)]] if text else [])
    turns = (Turn("ocr", "read it", None), Turn("qa", f"which number? {row}", str(row))) if row % 2 else ()
    return Document(text, turns, (f"document {row}",) if row % 3 == 0 else (), lines=boxes)


def write_documents(directory: Path, rows: range, *, num_classes: int = 0, most_pages: int = 3) -> Path:
    """Writes a document set; page p of document r is the id picture r of 40 + r by 30 + 10 p pixels."""
    labels = {"num_classes": num_classes, "label_width": 2} if num_classes else {}
    with ShardWriter(directory, kind="document", samples_per_shard=4, **labels) as writer:
        for row in rows:
            count = 1 + row % most_pages
            pages = {f"page{page:04d}.jpg": encode(id_picture(row, 40 + row, 30 + 10 * page)) for page in range(count)}
            own = np.array([row % num_classes, -1]) if num_classes else None
            writer.add(f"document-{row}", {"json": document_of(row, count).encode(), **pages}, own)
    return directory


def write_tokenizer(path: Path) -> Path:
    """Trains a byte-level BPE on the words above and writes its tokenizer.json; the same each time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def write_boxed_documents(directory: Path, rows: range, words: tuple[str, ...] = WORDS) -> Path:
    """Writes documents whose every word has a box, some without any, with the vocabulary of their classes; every
    second word of `words` is one."""
    vocabulary = Vocabulary(words[::2], (1,) * len(words[::2]), {})
    with ShardWriter(
        directory, kind="document", num_classes=len(vocabulary), label_width=1, samples_per_shard=4
    ) as writer:
        for row in rows:
            count = 1 + row % 2
            said = [words[(3 * row + i) % len(words)] for i in range(row % 6)]
            boxes, start = [], 0
            for number, word in enumerate(said):
                left, top = 3 * number, 4 * number
                boxes.append([number % count, left, top, left + 17 + number, top + 9, start, start + len(word)])
                start += len(word) + 1
            document = Document(" ".join(said), words=Boxes.of(boxes))
            pages = {f"page{page:04d}.jpg": encode(id_picture(row, 44, 36 + 10 * page)) for page in range(count)}
            writer.add(f"boxed-{row}", {"json": document.encode(), **pages}, np.array([-1]))
        writer.add_file(VOCABULARY_FILE, vocabulary.encode())
    return directory
