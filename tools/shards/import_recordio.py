"""Converts the reference's .rec/.idx files into a shard set.

    python tools/shards/import_recordio.py --kind ocr --num-classes 365187 --output DIR a.rec b.rec

Labels become int32; pages whose labels are all 0 (no words were found) get -1 = none. Pictures that training could not
decode are recorded in DIR.rejects.jsonl and left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from megatron_ove.data.recordio import integer_labels, read_records
from megatron_ove.data.shard_format import Kind
from megatron_ove.data.shard_index import ShardWriter
from megatron_ove.errors import DataError
from megatron_ove.preprocess.tool_arguments import run_tool, whole_number
from megatron_ove.rejects import RejectsFile


def import_records(files: list[Path], output: Path, *, kind: Kind, num_classes: int, samples_per_shard: int) -> int:
    """Writes every record of `files` to the shard set `output`; returns how many were rejected.

    Raises:
        DataError: unreadable files, inexact or out-of-range labels, records with different numbers of labels.
    """
    if not files:
        raise DataError("no .rec file was given; name at least one")
    width = next(read_records(files[0])).labels.size
    rejects = RejectsFile(output.with_name(output.name + ".rejects.jsonl"), stage="import_recordio")
    with (
        rejects,
        ShardWriter(
            output,
            kind=kind,
            num_classes=num_classes,
            label_width=width,
            rejects=rejects,
            samples_per_shard=samples_per_shard,
        ) as writer,
    ):
        for number, path in enumerate(files):
            stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:40]
            for record in read_records(path):
                labels = integer_labels(record, path, zeros_mean_none=kind == "ocr")
                key = f"{number:04d}_{stem}_{record.key:012d}"
                writer.add(key, {"jpg": record.picture}, labels, source=f"{path}:{record.key}")
        print(f"{output}: {len(writer)} samples with {width} labels each, {rejects.count} rejected")
    return rejects.count


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help=".rec files, each with its .idx beside it")
    parser.add_argument("--kind", choices=("image", "ocr"), required=True, help="what the pictures are")
    parser.add_argument("--num-classes", type=whole_number(1), required=True, help="label ids are 0 .. num_classes - 1")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new shard set; must not exist")
    parser.add_argument("--samples-per-shard", type=whole_number(1), default=4096)
    return run_tool(_work, parser.parse_args())


def _work(arguments: argparse.Namespace) -> None:
    import_records(
        arguments.files,
        arguments.output,
        kind=arguments.kind,
        num_classes=arguments.num_classes,
        samples_per_shard=arguments.samples_per_shard,
    )


if __name__ == "__main__":
    sys.exit(main())
