"""Rules of CONTRIBUTING.md that no linter checks: links that resolve, YAML that parses, heavy imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ove.config.yaml_file import read_yaml_mapping

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/*/*.md"), *ROOT.glob("tools/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_pages_resolve(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_shipped_yaml_parses_without_duplicate_keys() -> None:
    files = sorted((ROOT / "examples").rglob("*.yaml"))
    assert files
    for path in files:
        assert read_yaml_mapping(path)


def test_importing_the_package_is_light() -> None:
    code = "import sys, megatron_ove; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tests_named_on_the_page_of_bad_input_exist() -> None:
    named = set(re.findall(r"\btest_\w+", (ROOT / "docs/bad_input.md").read_text()))
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {path.stem for path in files}
    known.update(name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    assert named and not named - known


def test_secrets_stay_out_of_the_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"**/site.env", "**/.env*", "**/*.pem", "**/*.key", "runs", ".git"} <= set(ignored)
