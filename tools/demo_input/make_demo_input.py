"""Makes input for the quick start without a network, from photographs and fonts inside installed packages.

OUTPUT/train and OUTPUT/held_out each get images/, pages/ and clips/. Held-out images are other crops of the same
photographs, held-out pages other passages in other looks, and a held-out clip is the later cut of the training clip
with the same name, in the other codec. --cards adds cards/ with one to three large words, and OUTPUT/new_typefaces/
with cards in typefaces that no other card has. OUTPUT/page_truth.jsonl holds what is written where on pages and cards.
Everything follows from --seed; a second run with the same options does nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

from megatron_ove.errors import DataError
from megatron_ove.preprocess.demo_input.writer import DemoSizes, DemoWriter, demo_files, write_truth
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.record_files import open_rejects
from megatron_ove.preprocess.tool_arguments import add_run_options, report, run_tool, whole_number
from megatron_ove.whole_file import write_whole


def _parser() -> argparse.ArgumentParser:
    defaults = DemoSizes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to make")
    for name, value in defaults.as_record().items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=whole_number(0), default=value, help="default: %(default)s"
        )
    add_run_options(parser)
    return parser


def _work(arguments: argparse.Namespace) -> None:
    sizes = DemoSizes(**{name: getattr(arguments, name) for name in DemoSizes().as_record()})
    manifest = arguments.output / "manifest.json"
    content = json.dumps({"made_by": "tools/demo_input/make_demo_input.py", **sizes.as_record()}, indent=2).encode()
    if manifest.exists() and manifest.read_bytes() == content:
        report(f"{arguments.output} was made with these options already; nothing to do")
        return
    if arguments.output.exists() and any(arguments.output.iterdir()):
        raise DataError(
            f"{arguments.output} is not empty and holds something else than these options would make; remove it or "
            "choose another folder"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)  # now, so that a wrong path is one error and not one a file
    files = demo_files(arguments.output, sizes)
    with open_rejects(arguments.rejects, stage="demo input", files=files) as rejects:
        truths = [
            truth
            for _, truth in run_over_files(
                functools.partial(DemoWriter, arguments.output, sizes),
                files,
                title="making demo input",
                workers=arguments.workers,
                rejects=rejects,
            )
        ]
        if rejects.count:
            raise DataError(f"{rejects.count} files could not be made; the reasons are in {arguments.rejects}")
    write_truth(arguments.output, [truth for truth in truths if truth is not None])
    write_whole(manifest, content)
    report(f"{len(files)} files and {sizes.clips} held-out cuts -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
