"""Pages with text + vocabulary -> samples of a shard set: the last step, whoever read the words."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.ocr.lines import MIN_SCORE
from megatron_ove.preprocess.ocr.recognition import READ_BY, PageRecord
from megatron_ove.preprocess.ocr.tags import NUM_TAGS, page_tags
from megatron_ove.preprocess.ocr.words import is_same_segmentation, segmentation_name
from megatron_ove.preprocess.pictures import JpegPreparer
from megatron_ove.preprocess.record_files import stale_reasons
from megatron_ove.preprocess.tool_arguments import whole_number
from megatron_ove.rejects import RejectsFile
from megatron_ove.vocabulary import Vocabulary


class SampleWriter(Protocol):
    """What pages are added to: a `ShardWriter`."""

    def add(self, key: str, members: Mapping[str, bytes], labels: np.ndarray, *, source: str | None = None) -> bool:
        """Checks one sample and appends it; False when it was rejected."""
        ...


@dataclass(frozen=True)
class TaggedPage:
    """A page that can be written: its picture, and [num_tags] int32 word ids, -1 = none."""

    picture: InputFile
    ids: np.ndarray


def add_tag_options(parser: argparse.ArgumentParser) -> None:
    """Adds how words become labels: --num-tags and --fill."""
    parser.add_argument(
        "--num-tags", type=whole_number(1), default=NUM_TAGS, help="label slots of a page (default: %(default)s)"
    )
    parser.add_argument(
        "--fill",
        choices=["none", "cyclic"],
        default="none",
        help="what follows a page's last tag: -1, or the tags again as OneVision-Encoder does (default: %(default)s)",
    )


def check_origin(vocabulary: Vocabulary, pages: Iterable[PageRecord], path: Path) -> None:
    """Refuses pages that were read or would be segmented otherwise than those of the vocabulary at `path`.

    Texts that were known beforehand go with every engine's vocabulary, and their vocabulary with every engine.

    Raises:
        DataError: they do not match.
    """
    segmentation, engine = vocabulary.info.get("segmentation"), vocabulary.info.get("engine")
    if not is_same_segmentation(segmentation):
        raise DataError(
            f"{path} was built with the word segmentation {segmentation}, but this installation has "
            f"{segmentation_name()}; build the vocabulary again, or install or remove PyICU"
        )
    for page in pages:
        if engine is not None and page.engine is not None and page.engine != engine:
            raise DataError(
                f"{page.file} was read by {page.engine['name']} {page.engine['version']} with other models than the "
                f"pages of {path}; read all pages with one engine"
            )


_Judged = TypeVar("_Judged")


def judge_pages(
    pages: Iterable[PageRecord], judge: Callable[[PageRecord], _Judged], *, rejects: RejectsFile
) -> list[_Judged]:
    """Returns what `judge` makes of every page.

    A page of which it raises `DataError`, one that stands there twice, and one whose file has changed since it was read
    go to `rejects`.
    """
    pages = list(pages)
    reasons = stale_reasons([(page.file, page.file_state) for page in pages], READ_BY)
    judged: dict[tuple[str, int], _Judged] = {}
    for page, reason in zip(pages, reasons, strict=True):
        picture = page.input_file
        try:
            if picture.identity in judged:
                raise DataError(f"{picture} stands in the list of pages twice; its first lines are used")
            if reason:
                raise DataError(reason)
            judged[picture.identity] = judge(page)
        except DataError as error:
            rejects.add(picture, str(error))
    return list(judged.values())


def tag_pages(
    pages: Iterable[PageRecord],
    vocabulary: Vocabulary,
    *,
    rejects: RejectsFile,
    num_tags: int = NUM_TAGS,
    fill: Literal["none", "cyclic"] = "none",
    min_score: float = MIN_SCORE,
) -> list[TaggedPage]:
    """Chooses the tags of every page; a page without any goes to `rejects`, as do those of `judge_pages`."""

    def tag(page: PageRecord) -> TaggedPage:
        tags = page_tags(page.lines, vocabulary, num_tags=num_tags, fill=fill, min_score=min_score)
        return TaggedPage(page.input_file, tags.ids)

    return judge_pages(pages, tag, rejects=rejects)


def add_pages(
    writer: SampleWriter,
    pages: Iterable[TaggedPage],
    *,
    rejects: RejectsFile,
    longest_side: int,
    quality: int,
    workers: int,
) -> None:
    """Adds every page to `writer` as the JPEG of its picture; an unusable picture goes to `rejects`.

    Args:
        writer: the open shard set.
        pages: each file once.
        rejects: of this stage.
        longest_side: in pixels; larger pictures are scaled down.
        quality: of JPEGs that must be made.
        workers: processes.
    """
    ids = {page.picture: page.ids for page in pages}
    make_task = functools.partial(JpegPreparer, longest_side=longest_side, quality=quality)
    for picture, jpeg in run_over_files(make_task, list(ids), title="writing pages", workers=workers, rejects=rejects):
        writer.add(picture.key, {"jpg": jpeg}, ids[picture], source=str(picture))
