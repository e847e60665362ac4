"""Step 1 of the codec pipeline: a folder of clips -> one .npz per clip with its selected patches and grid frames.

Run it again to go on: clips that are selected already are kept, those of another folder are added.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.codec.clip_store import CLIP_FIELDS, ClipSelector, load_clip
from megatron_ove.preprocess.codec.mosaic import contact_sheet
from megatron_ove.preprocess.codec.settings import CodecSettings
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.folders import list_inputs
from megatron_ove.preprocess.pictures import encode_jpeg
from megatron_ove.preprocess.record_files import (
    continue_records,
    open_rejects,
    read_records,
    require_same_settings,
    write_records,
)
from megatron_ove.preprocess.sole_writer import sole_writer
from megatron_ove.preprocess.tool_arguments import (
    add_run_options,
    report,
    report_listing,
    run_tool,
    whole_number,
)
from megatron_ove.whole_file import write_whole

_BUDGET_SHARE = 8  # the default budget is an eighth of all patches: 2,048 of 16,384 at 224 x 224


def _parser() -> argparse.ArgumentParser:
    defaults = CodecSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder of video files, searched recursively")
    parser.add_argument("output", type=Path, help="folder for the .npz files and clips.jsonl")
    parser.add_argument(
        "--frame-height", type=whole_number(1), default=defaults.frame_height, help="default: %(default)s"
    )
    parser.add_argument(
        "--frame-width", type=whole_number(1), default=defaults.frame_width, help="default: %(default)s"
    )
    parser.add_argument("--patch-size", type=whole_number(1), default=defaults.patch_size, help="default: %(default)s")
    parser.add_argument(
        "--frames", type=whole_number(1), default=defaults.num_frames, help="of the time grid (default: %(default)s)"
    )
    parser.add_argument(
        "--patch-budget", type=whole_number(1), help="most patches of a clip (default: an eighth of all)"
    )
    parser.add_argument("--fit", choices=["crop", "letterbox"], default=defaults.fit, help="default: %(default)s")
    parser.add_argument(
        "--min-score",
        type=float,
        default=defaults.min_score,
        help="least energy of a kept patch (default: %(default)s)",
    )
    parser.add_argument(
        "--max-frame-share",
        type=float,
        default=defaults.max_frame_share,
        help="largest part of one later frame that may be kept (default: %(default)s)",
    )
    parser.add_argument("--contact-sheets", type=Path, help="also write a picture of each clip's selection here")
    add_run_options(parser)
    return parser


def _settings(arguments: argparse.Namespace) -> CodecSettings:
    patches = (arguments.frame_height // arguments.patch_size) * (arguments.frame_width // arguments.patch_size)
    budget = arguments.patch_budget
    return CodecSettings(
        num_frames=arguments.frames,
        frame_height=arguments.frame_height,
        frame_width=arguments.frame_width,
        patch_size=arguments.patch_size,
        patch_budget=max(patches * arguments.frames // _BUDGET_SHARE, patches) if budget is None else budget,
        fit=arguments.fit,
        min_score=arguments.min_score,
        max_frame_share=arguments.max_frame_share,
    )


def _work(arguments: argparse.Namespace) -> None:
    with sole_writer(arguments.output / "clips.jsonl"):
        _select(arguments)


def _select(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    table = arguments.output / "clips.jsonl"
    earlier = read_records(table, made_by="this script", fields=CLIP_FIELDS) if table.exists() else []
    require_same_settings(earlier, "settings", settings.as_record(), table)
    listing = list_inputs(arguments.clips, "video")
    plan = continue_records(earlier, listing.inputs)
    make_task = functools.partial(ClipSelector, arguments.output, settings)
    selected: list[Mapping[str, Any]] = []
    with open_rejects(arguments.rejects, stage="clips", files=[*plan.todo, *listing.unreadable]) as rejects:
        report_listing(listing, rejects)
        for _, name in run_over_files(
            make_task, plan.todo, title="selecting patches", workers=arguments.workers, rejects=rejects
        ):
            clip = load_clip(arguments.output / name)
            selected.append({"stored": name, **clip.info})
            if arguments.contact_sheets is not None:
                sheet = contact_sheet(clip.decoded_frames(), clip.positions, settings.patch_size, frame_width=112)
                # Named after the stored clip, which is a file of ours; a key is what the file says of itself.
                write_whole(arguments.contact_sheets / f"{Path(name).stem}.jpg", encode_jpeg(sheet))
        num_new, here = len(selected), plan.kept + selected
        if not here:
            raise DataError(
                f"none of the {len(listing.inputs)} files in {arguments.clips} is a usable clip; the reasons are in "
                f"{arguments.rejects}"
            )
        write_records(table, sorted(plan.elsewhere + here, key=lambda record: record["key"]))
        num_patches = sum(record["patches"] for record in here) / len(here)
        report(
            f"{len(here)} clips ({plan.counts(num_new)}), {num_patches:.0f} of at most {settings.patch_budget} patches "
            f"on average, {rejects.count} rejected -> {arguments.output}"
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
