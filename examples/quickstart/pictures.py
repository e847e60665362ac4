"""The demo's additions to the run's page: pictures and rankings, as data and files in `<run>/report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from measures import HeldOut, Model
from torch import Tensor

from megatron_ove.convert.class_centers import ClassHead
from megatron_ove.evaluation.pages_read import choose_pages, draw_pages, read_pages
from megatron_ove.evaluation.retrieval import average_precision, cosine_scores, labels_to_relevant
from megatron_ove.preprocess.codec.clip_store import StoredClip, load_clip
from megatron_ove.preprocess.codec.mosaic import contact_sheet
from megatron_ove.preprocess.ocr.recognition import PageRecord
from megatron_ove.preprocess.ocr.words import segment_words
from megatron_ove.preprocess.pictures import decode_picture, load_picture
from megatron_ove.preprocess.record_files import read_records
from megatron_ove.report.pictures import draw_boxes, save_jpeg
from megatron_ove.report.sections import (
    GalleryBlock,
    GalleryRow,
    Picture,
    PictureBlock,
    Section,
    Word,
    WordBlock,
    WordColumn,
)
from megatron_ove.shards.shard_set import ShardSet

STAGES = ("before training", "after training")
_NUM_WORDS = 24
_NUM_CARDS = 18
_NUM_QUERIES = 5
_NUM_NEIGHBOURS = 6
_SHEET_FRAME_WIDTH = 104


def page_section(
    lines: Path, folder: Path, held_out: Mapping[str, HeldOut], models: Mapping[str, Model], words: list[str]
) -> Section:
    """The held-out page of median quality with its boxes and tags, and the words whose centers lie nearest to it."""
    pages = held_out[STAGES[1]].pages
    row = _median_page(held_out[STAGES[1]], models[STAGES[1]])
    ids = [int(label) for label in pages.labels[row] if label >= 0]
    records = [
        PageRecord.from_record(record) for record in read_records(lines, made_by="tools/ocr/1_recognize_pages.py")
    ]
    page = next(record for record in records if record.key == pages.keys[row])
    known = {words[label] for label in ids}
    is_tagged = [bool(known & set(segment_words(line.text))) for line in page.lines]
    item = page.input_file
    boxes = [np.array(line.box) for line in page.lines]
    drawn = draw_boxes(load_picture(item.path, item.sheet, suffix=item.suffix), boxes, is_tagged)
    save_jpeg(drawn, folder / "page_boxes.jpg", longest_side=900)
    picture = Picture(
        file="page_boxes.jpg",
        alt=f"A page of text with {len(page.lines)} recognized lines outlined",
        caption=f"{len(page.lines)} lines read by OCR; green: lines with words of the vocabulary. Its {len(ids)} tags, "
        f"most visible first: {', '.join(words[label] for label in ids)}.",
    )
    columns = [
        _nearest_words(stage, held_out[stage].pages.embeddings[row], models[stage].heads["page_words"], set(ids), words)
        for stage in STAGES
    ]
    return Section(
        title="A held-back page and its words",
        text="The encoder never saw this page. What it makes of it is compared with the class center of every word "
        f"of the vocabulary; below are the {_NUM_WORDS} nearest words with their cosine. A word is right when OCR "
        "found it on the page. Of the held-back pages this is the one of median average precision.",
        blocks=[PictureBlock(items=[picture], size="half"), WordBlock(columns=columns)],
    )


def card_section(data_dir: Path, folder: Path, held_out: Mapping[str, HeldOut], models: Mapping[str, Model]) -> Section:
    """Held-out cards with the words read on them before and after, in typefaces of training and in others."""
    after = held_out[STAGES[1]]
    pictures = []
    for split, title in (("held_out", "typefaces of training"), ("new_typefaces", "typefaces never seen")):
        shards = ShardSet.open(data_dir / "pages" / split)
        vocabulary = shards.read_vocabulary()
        embedded = after.pages if split == "held_out" else after.new_typefaces
        assert vocabulary is not None and embedded is not None
        rows = choose_pages(embedded, _NUM_CARDS)
        for stage in STAGES if split == "held_out" else STAGES[1:]:
            of_stage = held_out[stage].pages if split == "held_out" else after.new_typefaces
            assert of_stage is not None
            read = read_pages(of_stage, rows, models[stage].heads["page_words"], vocabulary)
            file = f"cards_{split}_{stage.split()[0]}.png"
            draw_pages(shards, rows, read, folder / file)
            right = sum(page.read[0] in page.words for page in read)
            caption = f"{stage.capitalize()}, {title}: the first word is right on {right} of these {len(read)} cards."
            pictures.append(Picture(file=file, alt=f"Cards and the words read on them {stage}", caption=caption))
    return Section(
        title="Held-back cards and the words read on them",
        text="The encoder never saw these cards. Each is compared with the class center of every word of the "
        "vocabulary; below it stand as many of the nearest words as it has, green if they are on it.",
        blocks=[PictureBlock(items=pictures)],
    )


def _median_page(held_out: HeldOut, model: Model) -> int:
    """Returns the held-out page that is neither the best nor the worst example."""
    head = model.heads["page_words"]
    relevant = labels_to_relevant(held_out.pages.labels, len(head))
    order = average_precision(head.cosines(held_out.pages.embeddings), relevant).argsort()
    return int(order[len(order) // 2])


def _nearest_words(stage: str, embedding: Tensor, head: ClassHead, right: set[int], words: list[str]) -> WordColumn:
    scores = head.cosines(embedding[None])[0]
    values, order = scores.topk(min(_NUM_WORDS, len(words)))
    ranked = [
        Word(text=words[index], right=index in right, note=f"{value:.2f}")
        for value, index in zip(values.tolist(), order.tolist(), strict=True)
    ]
    hits = sum(word.right for word in ranked)
    return WordColumn(title=f"{stage.capitalize()}: {hits} of {len(ranked)} right", words=ranked)


def clip_section(stored: Path, folder: Path) -> Section:
    """The contact sheet of the clip whose selection is spread over most frames; of several, the most colourful."""
    clips = [load_clip(path) for path in sorted(stored.glob("*.npz"))]
    clip = max(clips, key=_spread)
    frames = clip.decoded_frames()
    patch_size = clip.info["settings"]["patch_size"]
    sheet = contact_sheet(frames, clip.positions, patch_size, frame_width=_SHEET_FRAME_WIDTH)
    save_jpeg(sheet, folder / "clip_sheet.jpg", quality=88)
    total = len(frames) * (frames.shape[1] // patch_size) * (frames.shape[2] // patch_size)
    caption = (
        f"{clip.info['source_codec']} clip of {clip.info['source_frames']} frames: {len(clip.positions)} of {total} "
        f"patches kept ({100 * len(clip.positions) / total:.1f} %), the first frame whole, then where motion and "
        "residual energy are highest."
    )
    picture = Picture(
        file="clip_sheet.jpg", alt="64 frames of a clip; selected patches lit, others dark", caption=caption
    )
    return Section(
        title="A clip and its selected patches",
        text="A clip is seen as 64 frames evenly spread over its length. Only the lit patches enter the encoder, each "
        "at its place in time and picture.",
        blocks=[PictureBlock(items=[picture])],
    )


def _spread(clip: StoredClip) -> tuple[int, float]:
    """(frames with a selected patch, colourfulness: the mean spread of red, green and blue in the selected patches)."""
    mosaic = decode_picture(clip.mosaic, name=clip.info["key"]).astype(np.int16)
    return len(np.unique(clip.positions[:, 0])), float((mosaic.max(axis=2) - mosaic.min(axis=2)).mean())


def neighbour_section(data_dir: Path, folder: Path, held_out: Mapping[str, HeldOut]) -> Section:
    """Held-out images and their nearest training images, before and after."""
    queries, gallery = ShardSet.open(data_dir / "images/held_out"), ShardSet.open(data_dir / "images/train")
    num_classes = gallery.info.num_classes
    after = held_out[STAGES[1]]
    shared = _shared_labels(after.images.labels, after.train_images.labels, num_classes)
    order = torch.linspace(0, len(queries) - 1, min(_NUM_QUERIES, len(queries))).long().tolist()
    rows = []
    for query in order:
        for stage in STAGES:
            embedded = held_out[stage]
            scores = cosine_scores(embedded.images.embeddings[query][None], embedded.train_images.embeddings)[0]
            nearest = scores.topk(min(_NUM_NEIGHBOURS, len(gallery))).indices.tolist()
            found = [_thumbnail(gallery, i, folder, int(shared[query, i])) for i in nearest]
            rows.append(
                GalleryRow(label=stage.capitalize(), query=_thumbnail(queries, query, folder, None), found=found)
            )
    return Section(
        title="Nearest neighbours of held-back images",
        text="Left the held-back image, then the training images nearest to it by cosine. A neighbour is right when it "
        "shares at least half of the image's clusters; the number says how many.",
        blocks=[GalleryBlock(rows=rows)],
    )


def _shared_labels(queries: Tensor, gallery: Tensor, num_classes: int) -> Tensor:
    """[q, L], [g, L] int -> [q, g]: number of labels in common."""
    return labels_to_relevant(queries, num_classes).float() @ labels_to_relevant(gallery, num_classes).float().T


def _thumbnail(shards: ShardSet, index: int, folder: Path, shared: int | None) -> Picture:
    key = shards.key(index)
    file = f"image_{shards.directory.name}_{index}.jpg"
    if not (folder / file).exists():
        save_jpeg(decode_picture(shards.read(index, "jpg"), name=key), folder / file, longest_side=150, quality=80)
    count = int((shards.labels[index] >= 0).sum())
    if shared is None:
        return Picture(file=file, alt=f"Held-back image {key}", caption="held back")
    return Picture(file=file, alt=f"Training image {key}", caption=f"{shared} of {count}", right=2 * shared >= count)
