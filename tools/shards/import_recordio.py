"""Converts .rec/.idx files, as the reference, im2rec and insightface write them, into a shard set.

    python tools/shards/import_recordio.py --kind ocr --num-classes 365187 --output DIR a.rec b.rec

Labels become int32; -1 is none, fewer labels than the set has are filled with it, and pages whose labels are all 0 (no
words were found) get it. Of insightface's sets of faces (the first record is a header) the pictures are taken, each
with its identity as the only label. Pictures that training could not decode are recorded in DIR.rejects.jsonl and left
out.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.tool_arguments import run_tool, whole_number
from megatron_ove.rejects import RejectsFile
from megatron_ove.shards.format import Kind
from megatron_ove.shards.recordio import PictureFile, integer_labels
from megatron_ove.shards.writer import ShardWriter

_LOOKED_AT = 1000


def import_records(
    files: list[Path],
    output: Path,
    *,
    kind: Kind,
    num_classes: int,
    samples_per_shard: int,
    label_width: int | None = None,
) -> int:
    """Writes every picture of `files` to the shard set `output`; returns how many were rejected.

    Args:
        files: .rec files.
        output: new folder.
        kind: image or ocr.
        num_classes: label ids are 0 .. num_classes - 1.
        samples_per_shard: samples in a tar file.
        label_width: labels a sample, filled with -1; None = the most that one of the first records of a file has.

    Raises:
        DataError: unreadable files, inexact or out-of-range labels, records with more labels than `label_width`.
    """
    if not files:
        raise DataError("no .rec file was given; name at least one")
    sources = [PictureFile(path) for path in files]
    width = label_width or max(map(_first_width, sources))
    with (
        RejectsFile(output.with_name(output.name + ".rejects.jsonl"), stage="import_recordio") as rejects,
        ShardWriter(
            output,
            kind=kind,
            num_classes=num_classes,
            label_width=width,
            rejects=rejects,
            samples_per_shard=samples_per_shard,
        ) as writer,
    ):
        for number, source in enumerate(sources):
            path = source.path
            if source.is_face_set:
                print(f"{path}: a set of faces with {len(source)} pictures; the identity is the label")
            stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:40]

            def reject(key: int, reason: str, path: Path = path) -> None:
                rejects.add(f"{path}:{key}", reason)

            for record in source.records(rejected=reject):
                labels = _filled(integer_labels(record, path, zeros_mean_none=kind == "ocr"), width, record.key, path)
                key = f"{number:04d}_{stem}_{record.key:012d}"
                writer.add(key, {"jpg": record.picture}, labels, source=f"{path}:{record.key}")
    print(f"{output}: {len(writer)} samples with {width} labels each, {rejects.count} rejected")
    return rejects.count


def _first_width(source: PictureFile) -> int:
    """Returns the largest number of labels among the first records; those behind them are seldom different."""
    records = source.records(rejected=lambda key, reason: None)
    return max((record.labels.size for record in itertools.islice(records, _LOOKED_AT)), default=1)


def _filled(labels: np.ndarray, width: int, key: int, path: Path) -> np.ndarray:
    if labels.size > width:
        raise DataError(
            f"record {key} of {path} has {labels.size} labels, but the samples of this set get {width} (the most among "
            f"the first {_LOOKED_AT} records of a file, unless --label-width says otherwise); give --label-width "
            f"{labels.size} or more, and samples with fewer labels are filled with -1 = none"
        )
    return np.pad(labels, (0, width - labels.size), constant_values=-1)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help=".rec files, each with its .idx beside it if it has one")
    parser.add_argument("--kind", choices=("image", "ocr"), required=True, help="what the pictures are")
    parser.add_argument("--num-classes", type=whole_number(1), required=True, help="label ids are 0 .. num_classes - 1")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new shard set; must not exist")
    parser.add_argument(
        "--label-width",
        type=whole_number(1),
        help=f"labels a sample (default: the most among the first {_LOOKED_AT} records of a file); filled with -1",
    )
    parser.add_argument("--samples-per-shard", type=whole_number(1), default=4096)
    return run_tool(_work, parser.parse_args())


def _work(arguments: argparse.Namespace) -> None:
    import_records(
        arguments.files,
        arguments.output,
        kind=arguments.kind,
        num_classes=arguments.num_classes,
        samples_per_shard=arguments.samples_per_shard,
        label_width=arguments.label_width,
    )


if __name__ == "__main__":
    sys.exit(main())
