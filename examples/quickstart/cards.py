"""Labels of the demo's own cards: OCR reads some of them, the words of the others are known from their making."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from phases import run_tool, say

from megatron_ove.preprocess.ocr.recognition import read_pages
from megatron_ove.preprocess.ocr.words import segment_words
from megatron_ove.preprocess.record_files import read_records


@dataclass(frozen=True)
class CardReading:
    """How OCR did on the cards it was given: words on them, words read that are there, and words that are not."""

    cards: int = 0
    words: int = 0
    right: int = 0
    wrong: int = 0


def write_card_lines(cards: Path, lines: Path, *, num_read: int, rejects: Path) -> CardReading:
    """Writes a lines.jsonl as tools/ocr/1_recognize_pages.py does, for the first `num_read` cards by that tool.

    Args:
        cards: folder of a split, made by tools/demo_input/make_demo_input.py.
        lines: file to write.
        num_read: cards that OCR reads.
        rejects: of the tool.
    """
    truth = _known_words(cards)
    files = sorted(cards.iterdir())
    reading, read = CardReading(), ""
    if num_read:
        folder, by_ocr = lines.with_suffix(".to_read"), lines.with_suffix(".read.jsonl")
        folder.mkdir(parents=True)
        for file in files[:num_read]:
            (folder / file.name).symlink_to(file)
        run_tool("tools/ocr/1_recognize_pages.py", folder, by_ocr, f"--rejects={rejects}")
        reading, read = _compare(by_ocr, truth), by_ocr.read_text(encoding="utf-8")
        say(f"      OCR read {reading.right} of the {reading.words} words on {num_read} cards, {reading.wrong} wrong")
    known = (
        {"key": file.stem, "file": str(file), "lines": [{"text": word} for word in truth[file.name]]}
        for file in files[num_read:]
    )
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text(read + "".join(json.dumps(record) + "\n" for record in known), encoding="utf-8")
    return reading


def _known_words(cards: Path) -> Mapping[str, list[str]]:
    """Returns file name -> words, for the cards of a folder."""
    root = cards.parents[1]
    records = read_records(
        root / "page_truth.jsonl", made_by="tools/demo_input/make_demo_input.py", fields=("file", "words")
    )
    folder = cards.relative_to(root)
    return {
        Path(record["file"]).name: [word["text"] for word in record["words"]]
        for record in records
        if Path(record["file"]).parent == folder
    }


def _compare(by_ocr: Path, truth: Mapping[str, list[str]]) -> CardReading:
    words = right = wrong = 0
    pages = read_pages(by_ocr)
    for page in pages:
        there = truth[Path(page.file).name]
        read = {word for line in page.lines for word in segment_words(line.text)}
        words, right, wrong = words + len(there), right + len(read & set(there)), wrong + len(read - set(there))
    return CardReading(len(pages), words, right, wrong)
