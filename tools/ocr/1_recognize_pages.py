"""Step 1 of the OCR pipeline: a folder of page pictures -> lines.jsonl (text, score and box of every line).

Safe to re-run: pages whose file is unchanged and that were read by the same engine are kept.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.folders import list_pictures, sample_key
from megatron_ove.preprocess.ocr.engines import DETECTION_SIDE, MIN_DETECTION_SIDE
from megatron_ove.preprocess.ocr.recognition import PageRecognizer
from megatron_ove.preprocess.record_files import RecordFile, file_state, open_rejects, read_records
from megatron_ove.preprocess.tool_arguments import add_run_options, report, run_tool, whole_number

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
    files = list_pictures(arguments.pages)
    keys = {file: sample_key(file, arguments.pages) for file in files}
    settings = {"engine": arguments.engine, **{k: str(v) for k, v in _engine_options(arguments).items()}}
    earlier = read_records(arguments.output, made_by="this script", fields=_FIELDS) if arguments.output.exists() else []
    states = {str(file): (keys[file], file_state(file), settings) for file in files}
    keep = [r for r in earlier if states.get(r["file"]) == (r["key"], r["file_state"], r["run_settings"])]
    done = {record["file"] for record in keep}
    todo = [file for file in files if str(file) not in done]
    make_task = functools.partial(PageRecognizer, arguments.engine, _engine_options(arguments))
    with open_rejects(arguments.rejects, stage="ocr", files=todo) as rejects, RecordFile(arguments.output, keep) as out:
        for file, page in run_over_files(
            make_task, todo, title="reading pages", workers=arguments.workers, rejects=rejects
        ):
            key, state, _ = states[str(file)]
            out.add({"key": key, "file": str(file), "file_state": state, "run_settings": settings, **page})
        if rejects.count == len(files):
            raise DataError(
                f"none of the {len(files)} files in {arguments.pages} is a usable picture; the reasons are in "
                f"{arguments.rejects}"
            )
        report(
            f"{len(files)} pages: {len(todo) - rejects.count} read now, {len(keep)} kept, {rejects.count} rejected -> "
            f"{arguments.output}"
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
