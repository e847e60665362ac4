"""The page of a shard set: what is wrong with it, its statistics, and samples drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.report.blocks import draw_header, draw_page, draw_table
from megatron_ove.report.curves import format_number
from megatron_ove.report.histogram import draw_histogram
from megatron_ove.report.set_samples import draw_sample, label_word, problem
from megatron_ove.report.set_statistics import SetStatistics
from megatron_ove.report.visible_text import visible
from megatron_ove.shards.shard_set import ShardSet

MAX_SAMPLES = 1000
"""Of a page; a document takes some hundred kilobytes of it."""
_MAX_PROBLEMS = 200
_KEYS_AT_ONCE = 1 << 20


def write_set_page(
    shards: ShardSet,
    output: str | Path,
    *,
    statistics: SetStatistics,
    rows: Sequence[int],
    words: Sequence[str] | None = None,
    problems: Sequence[str] = (),
    was_verified: bool = False,
) -> Path:
    """Writes the page of a shard set: one file that needs no other, no script and no network.

    Args:
        shards: the set.
        output: the HTML file; replaced if it exists.
        statistics: of the set.
        rows: samples that are shown, rows of the index.
        words: word of each class; None = classes are shown as numbers.
        problems: what a check of the set found.
        was_verified: whether that check was the deep one.

    Returns:
        Absolute path of the page.
    """
    name = visible(shards.directory.resolve().name)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        draw_header(f"Shard set {name}", visible(str(shards.directory.resolve())), _highlights(shards, statistics)),
        _check(problems, was_verified=was_verified),
        _statistics(statistics, words),
        _samples(shards, rows, words),
    ]
    target.write_text(draw_page(f"Shard set {name}", parts), encoding="utf-8")
    return target.resolve()


def draw_rows(count: int, samples: int, seed: int) -> list[int]:
    """Draws rows of an index evenly: one from each of `samples` equal pieces of it; all where there are no more.

    Args:
        count: rows, at least 1.
        samples: rows to draw.
        seed: of the draws.

    Returns:
        Ascending, each once; the same for the same arguments.
    """
    pieces = min(samples, count)
    bounds = [i * count // pieces for i in range(pieces + 1)] if pieces else [0]
    draws = np.random.default_rng(seed).random(pieces)
    return [
        first + int(draw * (stop - first))
        for first, stop, draw in zip(bounds[:-1], bounds[1:], draws.tolist(), strict=True)
    ]


def find_rows(shards: ShardSet, keys: Sequence[str]) -> list[int]:
    """Returns the rows of samples, in the order of `keys`, each once; reads all keys of the set, some at a time.

    Raises:
        DataError: the set has no sample of that key.
    """
    stored = shards.columns["keys"]
    wanted = {key.encode("utf-8", "surrogateescape"): key for key in keys}
    rows: dict[str, int] = {}
    for start in range(0, len(stored), _KEYS_AT_ONCE):
        chunk = np.asarray(stored[start : start + _KEYS_AT_ONCE])
        for place in np.flatnonzero(np.isin(chunk, list(wanted))).tolist():
            rows.setdefault(wanted[bytes(chunk[place])], start + place)
        if len(rows) == len(wanted):
            break
    missing = [key for key in wanted.values() if key not in rows]
    if missing:
        raise DataError(
            f"{shards.directory} has no sample with the key '{missing[0]}', so it cannot be shown; "
            f"its first is '{shards.key(0)}'"
        )
    return [rows[key] for key in wanted.values()]


def _highlights(shards: ShardSet, statistics: SetStatistics) -> list[tuple[str, str]]:
    info = shards.info
    found = [(info.kind, "kind"), (f"{statistics.num_samples:,}", "samples")]
    if statistics.num_pages:
        found.append((f"{statistics.num_pages:,}", "pages"))
    if info.num_classes:
        found.append((f"{info.num_classes:,}", "classes"))
    where = f" in {statistics.num_parts:,} parts" if statistics.num_parts else ""
    found.append((f"{statistics.num_shards:,}", f"shards{where}"))
    found.append((f"{statistics.shard_bytes / 2**20:,.1f} MiB", "in shards"))
    found.append((f"{info.patch_size} × {info.patch_size}", "pixels of a patch"))
    return found


def _check(problems: Sequence[str], *, was_verified: bool) -> str:
    if not problems:
        paragraph = "<p>Every file was read and compared with the index: nothing is wrong.</p>"
        return f"<section><h2>Check</h2>{paragraph}</section>" if was_verified else ""
    more = len(problems) - _MAX_PROBLEMS
    left_out = f'<p class="quiet">{more:,} more</p>' if more > 0 else ""
    return f"<section><h2>Check</h2>{''.join(map(problem, problems[:_MAX_PROBLEMS]))}{left_out}</section>"


def _statistics(statistics: SetStatistics, words: Sequence[str] | None) -> str:
    rows = [
        [one.name, *(format_number(value) for value in (one.minimum, one.median, one.mean, one.maximum))]
        for one in statistics.distributions
    ]
    charts = "".join(draw_histogram(one) for one in statistics.distributions if one.minimum < one.maximum and one.bars)
    parts = [
        f'<p class="quiet">{escape(statistics.basis)}</p>',
        draw_table(["", "least", "median", "mean", "greatest"], rows),
        *(f"<p>{escape(sentence)}</p>" for sentence in share_sentences(statistics)),
        f'<div class="charts">{charts}</div>' if charts else "",
    ]
    labels = statistics.labels
    if labels and labels.most_common:
        common = [
            [label_word(label, words), f"{count:,}", f"{count / labels.num_labels:.2%}"]
            for label, count in labels.most_common
        ]
        parts.append(f"<h3>Most common classes</h3>{draw_table(['class', 'labels', 'of all labels'], common)}")
    return f'<section class="statistics"><h2>Statistics</h2>{"".join(parts)}</section>'


def share_sentences(statistics: SetStatistics) -> list[str]:
    """Returns what is told of samples without labels and without text, and of classes, as sentences."""
    found, count = [], statistics.num_rows
    labels = statistics.labels
    if labels:
        found.append(f"{labels.num_without:,} of {count:,} samples ({labels.num_without / count:.1%}) have no label.")
        found.append(f"{labels.num_labels:,} labels are of {labels.num_classes:,} different classes.")
    if statistics.num_without_text is not None:
        empty = statistics.num_without_text
        found.append(f"{empty:,} of {count:,} documents ({empty / count:.1%}) have no text.")
    return found


def _samples(shards: ShardSet, rows: Sequence[int], words: Sequence[str] | None) -> str:
    legend = {
        "video": "Each shows some of its frames; patches that the codec did not select are dimmed.",
        "document": "Boxes are outlined, and patches without text dimmed, where a document says where its text stands; "
        "hold the pointer over a box to see what it says.",
    }.get(shards.info.kind, "")
    note = f'<p class="quiet">{len(rows):,} of {len(shards):,}. {legend}</p>'
    articles = "".join(draw_sample(shards, row, words) for row in rows)
    return f"<section><h2>Samples</h2>{note}{articles}</section>"
