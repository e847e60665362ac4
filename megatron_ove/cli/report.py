"""`megatron-ove report RUN_DIR`: draws the HTML page of a run."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "report",
        help="draw the HTML page of a run",
        description="Draws one self-contained HTML page from a run's folder.",
    )
    parser.add_argument("run_dir", help="folder of the run (holds metrics.jsonl)")
    parser.add_argument("--output", help="HTML file to write; default RUN_DIR/report.html")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and prints its path; returns the exit status."""
    from megatron_ove.report.run_report import write_run_report

    path = write_run_report(arguments.run_dir, arguments.output)
    sys.stdout.write(f"{path}\n")
    return 0
