"""Step 2 of the codec pipeline: stored clips -> descriptors.npz, for tools/clustering/2_cluster_descriptors.py."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.clustering.descriptor_sets import (
    DescriptorSet,
    SampleFiles,
    StoredClipDescriber,
    clip_describer_name,
)
from megatron_ove.preprocess.clustering.descriptors import build_describer
from megatron_ove.preprocess.codec.clip_store import CLIP_FIELDS
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.record_files import open_rejects, read_records
from megatron_ove.preprocess.tool_arguments import add_describer_option, add_run_options, report, run_tool, whole_number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path, help="folder that step 1 wrote")
    parser.add_argument("output", type=Path, help="descriptors.npz to write")
    parser.add_argument(
        "--describe-frames",
        type=whole_number(1),
        default=4,
        help="frames whose descriptors are joined (default: %(default)s)",
    )
    add_describer_option(parser)
    add_run_options(parser)
    return parser


def _work(arguments: argparse.Namespace) -> None:
    records = read_records(
        arguments.clips / "clips.jsonl", made_by="tools/codec/1_select_patches.py", fields=CLIP_FIELDS
    )
    files = [arguments.clips / record["stored"] for record in records]
    trust = arguments.trust_remote_code
    describer = build_describer(arguments.model_folder, trust_remote_code=trust)
    name = clip_describer_name(describer.name, arguments.describe_frames)
    make_task = functools.partial(
        StoredClipDescriber, arguments.model_folder, arguments.describe_frames, trust_remote_code=trust
    )
    with open_rejects(arguments.rejects, stage="clip descriptors", files=files) as rejects:
        described = [
            result
            for _, result in run_over_files(
                make_task, files, title="describing clips", workers=arguments.workers, rejects=rejects
            )
        ]
        if not described:
            raise DataError(f"no clip in {arguments.clips} could be described; the reasons are in {arguments.rejects}")
        DescriptorSet(
            SampleFiles.from_records([info for info, _ in described]),
            descriptors=np.stack([vector for _, vector in described]),
            describer=name,
        ).save(arguments.output)
        report(f"{len(described)} clips described by {name}, {rejects.count} rejected -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
