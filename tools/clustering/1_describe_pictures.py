"""Step 1 of the clustering pipeline: a folder of pictures -> descriptors.npz (one vector per picture).

Run it again to go on, also after it was interrupted (Ctrl-C, SIGTERM): pictures that are described already are kept,
those of another folder are added.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.clustering.descriptor_sets import DescriptorSet, PictureDescriber, SampleFiles
from megatron_ove.preprocess.clustering.descriptors import build_describer
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.folders import list_inputs
from megatron_ove.preprocess.record_files import as_record, continue_records, open_rejects
from megatron_ove.preprocess.sole_writer import sole_writer
from megatron_ove.preprocess.tool_arguments import (
    add_describer_option,
    add_run_options,
    report,
    report_listing,
    run_tool,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder of pictures, searched recursively")
    parser.add_argument("output", type=Path, help="descriptors.npz to write or continue")
    add_describer_option(parser)
    add_run_options(parser)
    return parser


def _earlier(output: Path, describer: str) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Returns key -> (record, descriptor) of what `output` holds; refuses descriptors of another kind."""
    if not output.exists():
        return {}
    stored = DescriptorSet.load(output)
    if stored.describer != describer:
        raise DataError(
            f"{output} holds {len(stored.descriptors)} descriptors made by {stored.describer}, which do not go "
            f"together with those of {describer}; use the same describer, or write to another file"
        )
    return {
        record["key"]: (record, row) for record, row in zip(stored.samples.records(), stored.descriptors, strict=True)
    }


def _work(arguments: argparse.Namespace) -> None:
    with sole_writer(arguments.output):
        _describe(arguments)


def _describe(arguments: argparse.Namespace) -> None:
    trust = arguments.trust_remote_code
    name = build_describer(arguments.model_folder, trust_remote_code=trust).name
    earlier = _earlier(arguments.output, name)
    listing = list_inputs(arguments.pictures, "picture")
    plan = continue_records([record for record, _ in earlier.values()], listing.inputs)
    make_task = functools.partial(PictureDescriber, arguments.model_folder, trust_remote_code=trust)
    described = [(record, earlier[record["key"]][1]) for record in plan.elsewhere + plan.kept]
    num_before = len(described)
    with open_rejects(arguments.rejects, stage="images", files=[*plan.todo, *listing.unreadable]) as rejects:
        report_listing(listing, rejects)
        try:
            for item, vector in run_over_files(
                make_task, plan.todo, title="describing pictures", workers=arguments.workers, rejects=rejects
            ):
                described.append((as_record(item), vector))
        finally:  # a run that is stopped keeps what it did
            if described:
                _save(described, name, arguments.output)
        num_new = len(described) - num_before
        if num_new + len(plan.kept) == 0:
            raise DataError(
                f"none of the {len(listing.inputs)} files in {arguments.pictures} is a usable picture; the reasons are "
                f"in {arguments.rejects}"
            )
        report(
            f"{num_new + len(plan.kept)} pictures described by {name} ({plan.counts(num_new)}), {rejects.count} "
            f"rejected -> {arguments.output}"
        )


def _save(described: Sequence[tuple[Mapping[str, Any], np.ndarray]], describer: str, output: Path) -> None:
    DescriptorSet(
        SampleFiles.from_records([record for record, _ in described]),
        descriptors=np.stack([vector for _, vector in described]),
        describer=describer,
    ).save(output)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
