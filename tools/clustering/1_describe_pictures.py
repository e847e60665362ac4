"""Step 1 of the clustering pipeline: a folder of pictures -> descriptors.npz (one vector per picture)."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.clustering.descriptor_sets import DescriptorSet, PictureDescriber
from megatron_ove.preprocess.clustering.descriptors import build_describer
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.folders import list_pictures, sample_key
from megatron_ove.preprocess.record_files import open_rejects
from megatron_ove.preprocess.tool_arguments import add_describer_option, add_run_options, report, run_tool


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path, help="folder of pictures, searched recursively")
    parser.add_argument("output", type=Path, help="descriptors.npz to write")
    add_describer_option(parser)
    add_run_options(parser)
    return parser


def _work(arguments: argparse.Namespace) -> None:
    files = list_pictures(arguments.pictures)
    trust = arguments.trust_remote_code
    name = build_describer(arguments.model_folder, trust_remote_code=trust).name
    make_task = functools.partial(PictureDescriber, arguments.model_folder, trust_remote_code=trust)
    described: list[tuple[Path, np.ndarray]] = []
    with open_rejects(arguments.rejects, stage="images", files=files) as rejects:
        described.extend(
            run_over_files(make_task, files, title="describing pictures", workers=arguments.workers, rejects=rejects)
        )
        if not described:
            raise DataError(
                f"none of the {len(files)} files in {arguments.pictures} is a usable picture; the reasons are in "
                f"{arguments.rejects}"
            )
        DescriptorSet(
            keys=np.array([sample_key(file, arguments.pictures) for file, _ in described]),
            files=np.array([str(file) for file, _ in described]),
            descriptors=np.stack([vector for _, vector in described]),
            describer=name,
        ).save(arguments.output)
        report(f"{len(described)} pictures described by {name}, {rejects.count} rejected -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
