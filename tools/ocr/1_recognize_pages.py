"""Step 1 of the OCR pipeline: a folder of page pictures -> lines.jsonl (text, score and box of every line).

Run it again to go on: pages that were read already are kept, those of another folder are added.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.folders import list_inputs
from megatron_ove.preprocess.ocr.engines import DETECTION_SIDE, MIN_DETECTION_SIDE
from megatron_ove.preprocess.ocr.recognition import PageRecognizer
from megatron_ove.preprocess.record_files import (
    RecordFile,
    as_record,
    continue_records,
    open_rejects,
    read_records,
    require_same_settings,
)
from megatron_ove.preprocess.sole_writer import sole_writer
from megatron_ove.preprocess.tool_arguments import (
    add_run_options,
    report,
    report_listing,
    run_tool,
    whole_number,
)

_READING = "tiles"  # changes when the same engine reads other words; earlier versions scaled large pages down
_FIELDS = ("file", "key", "file_state", "run_settings")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, help="folder of pictures, searched recursively")
    parser.add_argument("output", type=Path, help="lines.jsonl to write or continue")
    parser.add_argument("--engine", choices=["rapidocr", "paddleocr"], default="rapidocr", help="default: %(default)s")
    parser.add_argument(
        "--detection-side",
        type=whole_number(MIN_DETECTION_SIDE),
        default=DETECTION_SIDE,
        help="largest side of the tiles in which lines are found, whatever the page's size; less needs less memory "
        "(default: %(default)s)",
    )
    parser.add_argument("--detection-model-dir", type=Path, help="paddleocr: exported detection model")
    parser.add_argument("--recognition-model-dir", type=Path, help="paddleocr: exported recognition model")
    parser.add_argument("--device", default="cpu", help="paddleocr: cpu or gpu:0 (default: %(default)s)")
    add_run_options(parser)
    return parser


def _engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"detection_side": arguments.detection_side}
    if arguments.engine == "paddleocr":
        for name in ("detection_model_dir", "recognition_model_dir"):
            if getattr(arguments, name) is None:
                raise DataError(
                    f"--engine paddleocr needs --{name.replace('_', '-')}, because no model ships with it; give the "
                    "folder of an exported model"
                )
            options[name] = getattr(arguments, name)
        options["device"] = arguments.device
    return options


def _work(arguments: argparse.Namespace) -> None:
    with sole_writer(arguments.output):
        _recognize(arguments)


def _recognize(arguments: argparse.Namespace) -> None:
    options = {name: str(value) for name, value in _engine_options(arguments).items()}
    settings = {"engine": arguments.engine, "reading": _READING, **options}
    earlier: list[dict[str, Any]] = []
    if arguments.output.exists():
        earlier = read_records(arguments.output, made_by="this script", fields=_FIELDS, may_be_cut=True)
    require_same_settings(earlier, "run_settings", settings, arguments.output)
    listing = list_inputs(arguments.pages, "picture")
    plan = continue_records(earlier, listing.inputs)
    make_task = functools.partial(PageRecognizer, arguments.engine, _engine_options(arguments))
    with (
        open_rejects(arguments.rejects, stage="ocr", files=[*plan.todo, *listing.unreadable]) as rejects,
        RecordFile(arguments.output, plan.elsewhere + plan.kept) as out,
    ):
        report_listing(listing, rejects)
        num_new = 0
        for item, page in run_over_files(
            make_task, plan.todo, title="reading pages", workers=arguments.workers, rejects=rejects
        ):
            out.add({**as_record(item), "run_settings": settings, **page})
            num_new += 1
        if num_new + len(plan.kept) == 0:
            raise DataError(
                f"none of the {len(listing.inputs)} files in {arguments.pages} is a usable picture; the reasons are in "
                f"{arguments.rejects}"
            )
        report(
            f"{num_new + len(plan.kept)} pages ({plan.counts(num_new)}), {rejects.count} rejected -> {arguments.output}"
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
