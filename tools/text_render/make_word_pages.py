"""Makes a shard set of pictures of words, on which an encoder learns to read or is tested on it.

Strips hold one word, pages several in places of their own. Words are drawn evenly from a list: --words draws one of so
many from the project's text of a language, the same for every --seed; --vocabulary takes that of an earlier set, which
held-out sets need to get the same classes. Looks, from easy to hard: fixed, aligned, anywhere, coloured, degraded
(megatron_ove/preprocess/text_render/looks.py). Picture i follows from the options and --seed alone, whatever --workers
is; another seed gives other pictures. Held-out typefaces: siblings of those in training, or other families.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_ove.preprocess.file_runs import show_progress
from megatron_ove.preprocess.ocr.words import segmentation_name
from megatron_ove.preprocess.text_render.look_options import look_share, pair_of_numbers
from megatron_ove.preprocess.text_render.looks import LOOKS
from megatron_ove.preprocess.text_render.passages import draw_word_list, languages
from megatron_ove.preprocess.text_render.typefaces import script_of, typefaces
from megatron_ove.preprocess.text_render.word_pages import WordPages, WordSample, word_samples
from megatron_ove.preprocess.tool_arguments import (
    add_shard_options,
    add_workers_option,
    report,
    run_tool,
    whole_number,
)
from megatron_ove.shards.format import DOCUMENT_MEMBER, page_member
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    words = parser.add_mutually_exclusive_group(required=True)
    words.add_argument("--words", type=whole_number(1), help="number of words to draw from the project's texts")
    words.add_argument("--vocabulary", type=Path, help="vocabulary.json of an earlier set, instead of drawing words")
    parser.add_argument("--language", choices=languages(), default="en", help="of the words (default: %(default)s)")
    parser.add_argument(
        "--letters", **pair_of_numbers("LEAST", "MOST"), default=(3, 8), help="length of the words drawn (default: 3 8)"
    )
    parser.add_argument("--count", type=whole_number(1), required=True, help="number of pictures")
    parser.add_argument(
        "--looks",
        nargs="+",
        type=look_share,
        default=[(name, 1.0) for name in ("fixed", "aligned", "anywhere", "coloured")],
        metavar="NAME[=SHARE]",
        help=f"looks and their shares, among {', '.join(LOOKS)} (default: fixed aligned anywhere coloured, evenly)",
    )
    parser.add_argument(
        "--typefaces",
        choices=["train", "siblings", "families"],
        default="train",
        help="which split: those of training, unseen siblings, or unseen families (default: %(default)s)",
    )
    parser.add_argument("--pages", type=_share, default=0.25, help="share of pages among strips (default: %(default)s)")
    parser.add_argument(
        "--max-words", type=whole_number(1), default=6, help="most words of a page, and label slots (default: 6)"
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="give every picture the words of the next one, so that nothing but chance can be learned",
    )
    parser.add_argument(
        "--documents",
        action="store_true",
        help="write documents: words as text, a line each in the order of drawing, with boxes of words and characters",
    )
    parser.add_argument("--strip-size", **pair_of_numbers("WIDTH", "HEIGHT"), default=(112, 28), help="default: 112 28")
    parser.add_argument(
        "--page-size", **pair_of_numbers("WIDTH", "HEIGHT"), default=(112, 112), help="default: 112 112"
    )
    parser.add_argument("--patch-size", type=whole_number(1), default=14, help="of the set (default: %(default)s)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of all pictures (default: %(default)s)")
    add_shard_options(parser)
    add_workers_option(parser)
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 1")
    return value


def _recipe(arguments: argparse.Namespace, words: tuple[str, ...]) -> WordPages:
    return WordPages(
        words=words,
        faces=typefaces(script_of(arguments.language), arguments.typefaces),
        looks=tuple(LOOKS[name] for name, _ in arguments.looks),
        shares=tuple(share for _, share in arguments.looks),
        seed=arguments.seed,
        page_share=arguments.pages,
        max_words=arguments.max_words,
        strip=tuple(arguments.strip_size),
        page=tuple(arguments.page_size),
    )


def _with_words_of_the_next(samples: Iterator[WordSample]) -> Iterator[WordSample]:
    """Yields the same pictures, each with the words of the one that follows; the last one with those of the first."""
    first = next(samples)
    picture = first.picture
    for sample in samples:
        yield replace(sample, picture=picture)
        picture = sample.picture
    yield replace(first, picture=picture)


def _work(arguments: argparse.Namespace) -> None:
    from megatron_ove.shards.writer import ShardWriter

    given = Vocabulary.load(arguments.vocabulary) if arguments.vocabulary else None
    if given is None:
        words = draw_word_list(arguments.language, arguments.words, letters=tuple(arguments.letters))
    else:
        words = given.words
    recipe = _recipe(arguments, words)
    counts: Counter[int] = Counter()
    with ShardWriter(
        arguments.output,
        kind="document" if arguments.documents else "ocr",
        num_classes=len(words),
        label_width=arguments.max_words,
        samples_per_shard=arguments.samples_per_shard,
        patch_size=arguments.patch_size,
        overwrite=arguments.overwrite,
    ) as writer:
        samples = word_samples(recipe, arguments.count, workers=arguments.workers)
        samples = _with_words_of_the_next(samples) if arguments.control else samples
        for index, sample in enumerate(show_progress(samples, title="making pictures of words", total=arguments.count)):
            labels = np.full(arguments.max_words, -1, np.int32)
            labels[: len(sample.ids)] = sample.ids
            members = {"jpg": sample.picture}
            if arguments.documents:
                members = {DOCUMENT_MEMBER: sample.document, page_member(0): sample.picture}
            writer.add(f"words{index:08d}", members, labels)
            counts.update(sample.ids)
        info = {"engine": None, "segmentation": segmentation_name(), "num_pages": arguments.count}
        drawn = Vocabulary(words, tuple(counts[word] for word in range(len(words))), info)
        writer.add_file(VOCABULARY_FILE, (given or drawn).encode())
    report(f"{arguments.count} pictures, {len(words)} classes -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
