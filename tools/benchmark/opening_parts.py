"""How long it takes to open a shard set of many parts, what it looks at, and what it keeps in memory.

Parts are made sparse: their indexes are real, their tar files have the right size and the headers that are compared,
and no pictures. In one run: joining the parts; opening as rank 0, which looks at shard files, and as all other ranks;
the same samples as one set without parts for comparison.

    python tools/benchmark/opening_parts.py --parts 10000
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ove.preprocess.file_runs import show_progress
from megatron_ove.shards import format as layout
from megatron_ove.shards import index as files
from megatron_ove.shards.format import DOCUMENT_COLUMNS, DatasetInfo
from megatron_ove.shards.merge import merge_parts, part_name
from megatron_ove.shards.shard_set import ShardSet

_JSON_BYTES, _PAGE_BYTES = 900, 180_000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=1_000, help="of a part (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=2, help="of a part (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to put them (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser


def write_sparse_part(folder: Path, number: int, samples: int, shards: int) -> None:
    """Writes a part of one-page documents whose tar files are holes but for the first and last headers."""
    info = DatasetInfo(
        kind="document",
        num_samples=samples,
        num_classes=0,
        label_width=0,
        members=layout.member_names("document", 0, has_labels=False),
        patch_size=14,
        frames=0,
        grid_height=None,
        grid_width=None,
        created_by="megatron_ove",
        num_pages=samples,
        most_pages=1,
        columns=DOCUMENT_COLUMNS,
    )
    (folder / "index").mkdir(parents=True)
    (folder / "shards").mkdir()
    per_shard = -(-samples // shards)
    place = np.arange(samples) % per_shard
    stride = int(files.padded(np.array([_JSON_BYTES, _PAGE_BYTES])).sum())
    rows = np.zeros(samples, info.row_type)
    rows["offset"], rows["sizes"] = layout.TAR_BLOCK + place * stride, _JSON_BYTES
    firsts = np.arange(0, samples, per_shard)
    ends = np.minimum(firsts + per_shard, samples) - firsts
    keys = np.array([f"part{number:05d}-{i:06d}".encode() for i in range(samples)])
    table = np.zeros(len(firsts), files.SHARD_TYPE)
    table["first_row"] = firsts
    table["end"] = (ends - 1) * stride + layout.TAR_BLOCK + int(files.padded(np.array([_JSON_BYTES]))[0]) + _PAGE_BYTES
    arrays: dict[str, Any] = {
        files.ROWS: rows,
        files.KEYS: keys,
        files.SHARDS: table,
        files.PAGE_COUNT: np.ones(samples, "<i4"),
        "page_width": np.full(samples, 1344, "<i4"),
        "page_height": np.full(samples, 1000, "<i4"),
        files.PAGE_BYTES: np.full(samples, _PAGE_BYTES, "<u4"),
    }
    for name, array in arrays.items():
        np.save(folder / "index" / f"{name}.npy", array)
    for i, (first, count) in enumerate(zip(firsts.tolist(), ends.tolist(), strict=True)):
        with (folder / "shards" / layout.shard_name(i)).open("wb") as stream:
            stream.truncate(int(table["end"][i]) + 1024)
            for row in {first, first + count - 1}:
                key = keys[row].decode()
                offset = int(rows["offset"][row])
                for name, size in (("json", _JSON_BYTES), (layout.page_member(0), _PAGE_BYTES)):
                    stream.seek(offset - layout.TAR_BLOCK)
                    stream.write(layout.tar_header(f"{key}.{name}", size))
                    offset += int(files.padded(np.array([size]))[0])
    info.write(folder)


def memory_kib() -> int:
    """Returns this process's memory that is not mapped files, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def count_looks(action: Any) -> tuple[Any, float, dict[str, int]]:
    """Returns (result, seconds, what was done to files of shards: event -> count)."""
    looks: Counter[str] = Counter()
    stat = Path.stat

    def counted(path: Path, **options: Any) -> Any:
        looks["stat"] += path.suffix == ".tar"
        return stat(path, **options)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if is_counting and event == "open" and str(arguments[0]).endswith(".tar"):
            looks["open"] += 1

    is_counting = True
    sys.addaudithook(hook)
    Path.stat = counted  # type: ignore[method-assign]
    start = time.perf_counter()
    try:
        result = action()
    finally:
        seconds = time.perf_counter() - start
        is_counting = False
        Path.stat = stat  # type: ignore[method-assign]
    return result, seconds, dict(looks)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes, joins and opens parts; returns the figures."""
    for number in show_progress(range(arguments.parts), title="sparse parts"):
        part = folder / "parts" / part_name(number, arguments.parts)
        write_sparse_part(part, number, arguments.samples, arguments.shards)
    start = time.perf_counter()
    merge_parts(folder)
    figures: dict[str, Any] = {"samples": arguments.parts * arguments.samples, "join_s": time.perf_counter() - start}
    count = figures["samples"]
    for name, looks_at_shards in (("other_ranks", False), ("rank_0", True)):
        before = memory_kib()
        shards, seconds, looks = count_looks(lambda looks=looks_at_shards: ShardSet.open(folder, looks_at_shards=looks))
        figures[name] = {
            "seconds": round(seconds, 3),
            "looks_a_part": {event: number / arguments.parts for event, number in looks.items()},
            "bytes_a_sample_in_memory": round((memory_kib() - before) * 1024 / count, 2),
        }
        rows = np.random.default_rng(0).integers(0, count, 1000)
        start = time.perf_counter()
        for row in rows.tolist():
            shards.index.place(row, layout.page_member(0))
            shards.shard_path(row)
        figures[name]["place_us"] = round((time.perf_counter() - start) * 1e3, 1)
        del shards
    return figures


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = measure(Path(folder), arguments)
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
