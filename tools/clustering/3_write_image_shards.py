"""Step 3 of the clustering pipeline: labels.npz -> a shard set of images with their nearest cluster ids."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from megatron_ove.preprocess.clustering.descriptor_sets import LabelSet
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.pictures import JpegPreparer
from megatron_ove.preprocess.record_files import input_of, open_rejects, stale_reasons
from megatron_ove.preprocess.tool_arguments import (
    add_picture_options,
    add_run_options,
    add_shard_options,
    report,
    run_tool,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path, help="labels.npz of step 2")
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    add_picture_options(parser, longest_side=512)
    add_shard_options(parser)
    add_run_options(parser)
    return parser


def _work(arguments: argparse.Namespace) -> None:
    from megatron_ove.shards.writer import ShardWriter

    labelled = LabelSet.load(arguments.labels)
    records = labelled.samples.records()
    rows = {input_of(record): row for row, record in enumerate(records)}
    with open_rejects(arguments.rejects, stage="image shards", files=list(rows)) as rejects:
        looked_at = [(record["file"], record["file_state"]) for record in records]
        reasons = stale_reasons(looked_at, "tools/clustering/1_describe_pictures.py")
        current = []
        for item, row in rows.items():
            reason = reasons[row]
            if reason:
                rejects.add(item, reason)
            else:
                current.append(item)
        with ShardWriter(
            arguments.output,
            kind="image",
            num_classes=labelled.num_classes,
            label_width=labelled.labels.shape[1],
            rejects=rejects,
            samples_per_shard=arguments.samples_per_shard,
            patch_size=arguments.patch_size,
            overwrite=arguments.overwrite,
        ) as writer:
            make_task = functools.partial(JpegPreparer, longest_side=arguments.longest_side, quality=arguments.quality)
            for item, jpeg in run_over_files(
                make_task, current, title="writing images", workers=arguments.workers, rejects=rejects
            ):
                writer.add(item.key, {"jpg": jpeg}, labelled.labels[rows[item]], source=str(item))
            count = len(writer)
        report(f"{count} images, {labelled.num_classes} classes, {rejects.count} rejected -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
