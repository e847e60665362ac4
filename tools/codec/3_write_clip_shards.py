"""Step 3 of the codec pipeline: stored clips + labels.npz -> a shard set of clips with their nearest cluster ids."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.clustering.descriptor_sets import LabelSet
from megatron_ove.preprocess.codec.clip_store import CLIP_FIELDS, load_clip
from megatron_ove.preprocess.codec.settings import CodecSettings
from megatron_ove.preprocess.file_runs import show_progress
from megatron_ove.preprocess.record_files import open_rejects, read_records
from megatron_ove.preprocess.tool_arguments import add_shard_options, report, run_tool


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path, help="folder that step 1 wrote")
    parser.add_argument("labels", type=Path, help="labels.npz of tools/clustering/2_cluster_descriptors.py")
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    parser.add_argument("--rejects", type=Path, default=Path("rejects.jsonl"), help="default: %(default)s")
    add_shard_options(parser)
    return parser


def _common_settings(records: list[dict[str, object]], folder: Path) -> CodecSettings:
    settings = [record["settings"] for record in records]
    if not settings or any(other != settings[0] for other in settings):
        raise DataError(
            f"the clips in {folder} were selected with different settings or there are none, but a shard set has one "
            "grid; run tools/codec/1_select_patches.py again"
        )
    return CodecSettings.from_record(settings[0])  # type: ignore[arg-type]


def _require_same_file(
    record: Mapping[str, Any], stored: Mapping[str, Any], described: Mapping[str, Any], labels: Path
) -> None:
    """Refuses a clip whose record, .npz and labels are not of one file as it was at one time.

    Raises:
        DataError: the sentence is the reject reason.
    """
    key = record["key"]
    # Step 1 writes every .npz at once and clips.jsonl at its end.
    if any(stored.get(name) != record[name] for name in ("file", "file_state")):
        raise DataError(
            f"the clip {key} was selected again by a run of step 1 that did not get to its end, so that clips.jsonl "
            "and the stored clip do not match; run step 1 again, and then step 2"
        )
    if described.get("file_state") != record["file_state"]:
        what = "was selected again since it got" if described else "has no"
        raise DataError(f"the clip {key} {what} labels in {labels}; run step 2 again")


def _work(arguments: argparse.Namespace) -> None:
    from megatron_ove.shards.writer import ShardWriter

    records = read_records(
        arguments.clips / "clips.jsonl", made_by="tools/codec/1_select_patches.py", fields=CLIP_FIELDS
    )
    settings = _common_settings(records, arguments.clips)
    labelled = LabelSet.load(arguments.labels)
    rows = {record["key"]: (row, record) for row, record in enumerate(labelled.samples.records())}
    with open_rejects(
        arguments.rejects, stage="clip shards", files=[str(record["file"]) for record in records]
    ) as rejects:
        with ShardWriter(
            arguments.output,
            kind="video",
            num_classes=labelled.num_classes,
            label_width=labelled.labels.shape[1],
            rejects=rejects,
            samples_per_shard=arguments.samples_per_shard,
            patch_size=settings.patch_size,
            frames=settings.num_frames,
            grid_height=settings.grid_height,
            grid_width=settings.grid_width,
            overwrite=arguments.overwrite,
        ) as writer:
            writer.add_file("codec_settings.json", json.dumps(settings.as_record(), indent=2).encode())
            for record in show_progress(records, title="writing clips"):
                key, file = record["key"], record["file"]
                row, described = rows.get(key, (0, {}))
                try:
                    clip = load_clip(arguments.clips / record["stored"])
                    _require_same_file(record, clip.info, described, arguments.labels)
                except DataError as error:
                    rejects.add(file, str(error))
                    continue
                members = {"codec.jpg": clip.mosaic, "positions.npy": clip.positions_npy()}
                members |= {f"frame{index:02d}.jpg": frame for index, frame in enumerate(clip.frames)}
                writer.add(key, members, labelled.labels[row], source=file)
            count = len(writer)
        report(f"{count} clips, {labelled.num_classes} classes, {rejects.count} rejected -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
