"""`megatron-ove evaluate`: retrieval figures of an exported encoder on a shard set."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ove.cli.word_options import write_line
from megatron_ove.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ove.convert.class_centers import ClassHead
    from megatron_ove.evaluation.embedding import EmbeddedSet
    from megatron_ove.shards.shard_set import ShardSet
    from megatron_ove.vocabulary import Vocabulary

_DRAWN_PAGES = 24

_DESCRIPTION = """Embeds every sample of a shard set with an exported encoder and prints retrieval figures: labels
shared with the nearest other samples; with --checkpoint, the sample's labels among the nearest class centers, and a
label's samples among those nearest to its class center, against those of another sample, and words read on pages
where the checkpoint carries words; with --group-pattern, other samples of the same group. Of an exported reader
(`convert export --reader`): what it writes of documents, against what stands on them."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "evaluate", help="retrieval figures of an exported encoder on a shard set", description=_DESCRIPTION
    )
    parser.add_argument("--model", required=True, help="exported HuggingFace folder")
    parser.add_argument("--shards", required=True, help="folder of a shard set")
    parser.add_argument("--checkpoint", help="checkpoint folder whose class centers rank the labels")
    parser.add_argument("--objective", help="objective of the checkpoint whose class centers are meant")
    parser.add_argument("--group-pattern", help="regular expression; its first group, found in a key, names the group")
    parser.add_argument("--k", type=int, help="cut-off of rankings (default 10)")
    parser.add_argument("--samples", type=int, help="most samples to look at, spread evenly (default: all)")
    parser.add_argument("--image-size", type=int, help="side of images in pixels (default: that of the training)")
    parser.add_argument(
        "--max-patches",
        type=int,
        help="most patches of a page or clip (default 1024; of a reader as many as it was trained with)",
    )
    parser.add_argument("--max-tokens", type=int, help="most tokens of a document for a reader (default: as trained)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    parser.add_argument("--pages", type=int, default=5, help="pages whose words are printed (default 5; 0 = none)")
    parser.add_argument("--picture", help="also draw 24 pages and the words read on them to this PNG file")
    parser.set_defaults(run=run)


def _check_device(name: str) -> None:
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"--device {name} cannot be used ({reason}); give cpu or a device that is there") from error


def run(arguments: argparse.Namespace) -> int:
    """Prints the figures; returns the exit status."""
    from megatron_ove.convert.class_centers import load_class_head, load_words
    from megatron_ove.evaluation.embedding import SampleSettings, embed_shard_set
    from megatron_ove.evaluation.evaluate_shards import evaluate_embeddings, format_figures
    from megatron_ove.evaluation.huggingface import huggingface_encoder, load_exported_model
    from megatron_ove.shards.shard_set import ShardSet

    for name in ("k", "samples", "image_size", "max_patches", "max_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} looks at nothing; give at least 1")
    if arguments.pages < 0:
        raise ConfigError(f"--pages {arguments.pages} is less than none; give 0 or more")
    for name in ("output", "picture"):
        value = getattr(arguments, name)
        if value and not Path(value).resolve().parent.is_dir():
            raise ConfigError(f"--{name} {value} lies in a folder that does not exist; make it first")
    if arguments.picture and not arguments.checkpoint:
        raise ConfigError(
            "--picture draws the words that class centers stand for, and there are none without --checkpoint and "
            "--objective; give both"
        )
    _check_device(arguments.device)
    if _is_reader(arguments.model):
        return _evaluate_reader(arguments)
    if arguments.max_tokens is not None:
        raise ConfigError(f"--max-tokens has no effect, because {arguments.model} is no reader; leave it away")
    if bool(arguments.checkpoint) != bool(arguments.objective):
        raise ConfigError("--checkpoint and --objective name a table of class centers together; give both or neither")
    words = load_words(arguments.checkpoint, arguments.objective) if arguments.checkpoint else None
    if arguments.picture and words is None:
        raise ConfigError(
            f"--picture needs words, and the checkpoint {arguments.checkpoint} carries none for "
            f"{arguments.objective}; leave it away"
        )
    shards = ShardSet.open(arguments.shards)
    if arguments.picture and shards.info.kind == "video":
        raise ConfigError(f"--picture draws pages, and {arguments.shards} holds clips; leave it away or give pages")
    model = load_exported_model(arguments.model).to(arguments.device)
    patch_size = int(model.config.patch_size)
    image_size = int(model.config.image_size) if arguments.image_size is None else arguments.image_size
    settings = SampleSettings(patch_size=patch_size, image_size=image_size, max_patches=arguments.max_patches or 1024)
    rows = _chosen_rows(len(shards), arguments.samples)
    embedded = embed_shard_set(
        huggingface_encoder(model, patch_size), shards, settings, device=arguments.device, indices=rows
    )
    head = load_class_head(arguments.checkpoint, arguments.objective) if arguments.checkpoint else None
    figures = evaluate_embeddings(embedded, k=arguments.k or 10, head=head, group_pattern=arguments.group_pattern)
    sys.stdout.write(f"{len(rows)} samples of {arguments.shards}\n{format_figures(figures)}\n")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if head is not None and words is not None:
        _show_pages(arguments, shards, rows, embedded, head, words)
    return 0


def _chosen_rows(count: int, most: int | None) -> list[int]:
    """Returns the samples to look at, spread evenly over the set."""
    chosen = count if most is None else min(most, count)
    return [i * count // chosen for i in range(chosen)]


def _is_reader(folder: str) -> bool:
    from megatron_ove.hf_model.folder import READER_TYPE, read_config

    try:
        return read_config(folder).get("model_type") == READER_TYPE
    except (OSError, ValueError):
        return False  # whoever loads it says what is wrong


def _evaluate_reader(arguments: argparse.Namespace) -> int:
    """Prints what a reader makes of documents; returns the exit status."""
    from megatron_ove.evaluation.huggingface import load_exported_reader
    from megatron_ove.evaluation.reading import ReadingSettings, read_set, show_examples
    from megatron_ove.evaluation.text_figures import text_figures
    from megatron_ove.preprocess.file_runs import show_progress
    from megatron_ove.shards.shard_set import ShardSet
    from megatron_ove.shards.token_cache import TextTokenizer

    for name in ("checkpoint", "objective", "group_pattern", "image_size", "k"):
        if getattr(arguments, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect on a reader, which is measured by what it writes; leave it "
                "away"
            )
    shards, model = ShardSet.open(arguments.shards), load_exported_reader(arguments.model).to(arguments.device)
    trained = model.config.trained_on
    most_patches = arguments.max_patches or trained.get("max_patches") or 1024
    settings = ReadingSettings(
        most_patches, arguments.max_tokens or trained.get("max_text_tokens") or 256, arguments.device
    )
    tokenizer = TextTokenizer(arguments.model, normalisation=model.config.normalisation)
    rows = _chosen_rows(len(shards), arguments.samples)
    read = read_set(
        model, tokenizer, shards, settings, rows=rows, progress=lambda places: show_progress(places, title="reading")
    )
    given = {"loss": read.loss, "token_accuracy": read.token_accuracy}
    figures = {"answers": given, **text_figures(read.texts)}
    sys.stdout.write(f"{len(read.texts)} documents of {arguments.shards}, {read.without_text} more without a text\n")
    for family, values in figures.items():
        sys.stdout.write(f"{family}\n")
        sys.stdout.writelines(f"  {name:24}{value:8.4f}\n" for name, value in values.items())
    for line in show_examples(read, arguments.pages):
        write_line(f"  {line}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _show_pages(
    arguments: argparse.Namespace,
    shards: ShardSet,
    chosen: list[int],
    embedded: EmbeddedSet,
    head: ClassHead,
    words: Vocabulary,
) -> None:
    from megatron_ove.evaluation.pages_read import choose_pages, draw_pages, read_pages

    rows = choose_pages(embedded, arguments.pages)
    if rows:
        sys.stdout.write("Words of pages; in brackets what is read but not there:\n")
    for page in read_pages(embedded, rows, head, words):
        write_line(f"  {page}")
    if arguments.picture:
        rows = choose_pages(embedded, _DRAWN_PAGES)
        pages = read_pages(embedded, rows, head, words)
        draw_pages(shards, [chosen[row] for row in rows], pages, arguments.picture)
        sys.stdout.write(f"{arguments.picture}\n")
