"""The model and the export once more under transformers 5, whose loading differs from that of 4.57.

It lives in a folder of its own beside the installed one, made by `make setup`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("TRANSFORMERS5_DIR", Path(sys.prefix) / "transformers5"))
FILES = ["tests/numerics/test_hf_parity.py", "tests/numerics/test_hf_model.py", "tests/integration/test_hf_export.py"]
READER = "tests/integration/test_reader_export.py"


# Layouts have nothing to do with transformers. Of readers one kind of decoder has all that a folder is made of.
@pytest.mark.parametrize(("files", "chosen"), [(FILES, "not layout"), ([READER], "qwen2")], ids=["encoder", "reader"])
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no transformers 5 in {FOLDER}; make setup installs it")
def test_everything_holds_under_transformers_5(files: list[str], chosen: str) -> None:
    (distribution,) = FOLDER.glob("transformers-5.*.dist-info")
    version = re.fullmatch(r"transformers-(5\.[\d.]+)\.dist-info", distribution.name)
    assert version is not None
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "EXPECTED_TRANSFORMERS": version[1],
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=280, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout) and "skipped" not in result.stdout
