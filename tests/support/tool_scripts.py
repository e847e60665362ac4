"""Runs the scripts under tools/ in this process, as their command lines do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

_TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run_script(script: str, *arguments: object) -> int:
    """Loads tools/`script` and calls its main with `arguments` as texts; returns the exit status."""
    path = _TOOLS / script
    spec = importlib.util.spec_from_file_location("tool_" + path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def reject_reasons(path: Path) -> dict[str, str]:
    """Returns file name -> reason of a rejects.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {Path(record["file"]).name: record["reason"] for record in map(json.loads, lines)}
