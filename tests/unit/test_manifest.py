"""The list of a checkpoint's files: whatever happened to it, a checkpoint is usable or has a reason why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ove.checkpoint.manifest import MANIFEST_NAME, discard, structural_problem, write_manifest


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a").write_bytes(b"12")
    (folder / "common.pt").write_bytes(b"345")
    write_manifest(folder, step=7, files={"a": (2, 1), "common.pt": (3, 99)}, extra={"world_size": 1})
    return folder


def test_no_flipped_bit_of_a_manifest_is_more_than_a_reason(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step_00000007")
    assert structural_problem(folder) is None
    content, problems = (folder / MANIFEST_NAME).read_bytes(), set()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (folder / MANIFEST_NAME).write_bytes(changed)
            problems.add(structural_problem(folder))
    assert "its manifest.json cannot be read (it does not say the size of the file 'a')" in problems
    assert "its manifest.json cannot be read (it does not say the crc32 of the file 'common.pt')" in problems
    assert None in problems  # e.g. in the number of processes


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a": 2}, "it does not say the size of the file 'a'"),
        ({"a": {"size": 2, "crc32": "1"}}, "it does not say the crc32 of the file 'a'"),
        ({"a": {"size": True, "crc32": 1}}, "it does not say the size of the file 'a'"),
        ({"../a": {"size": 2, "crc32": 1}}, "it names the file '../a', which lies outside the checkpoint"),
        ({"/a": {"size": 2, "crc32": 1}}, "it names the file '/a', which lies outside the checkpoint"),
        (["a"], "it has no list of files"),
    ],
)
def test_entries_of_another_form_are_a_reason(tmp_path: Path, files: object, reason: str) -> None:
    folder = checkpoint(tmp_path / "step_00000007")
    (folder / MANIFEST_NAME).write_text(json.dumps({"format_version": 2, "files": files}))
    assert structural_problem(folder) == f"its manifest.json cannot be read ({reason})"


def test_a_manifest_that_is_no_text_or_nested_without_end_is_a_reason(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step_00000007")
    for content in (b"\xff\xfe", b"[" * 100_000):
        (folder / MANIFEST_NAME).write_bytes(content)
        assert (structural_problem(folder) or "").startswith("its manifest.json cannot be read (")
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()
    assert structural_problem(folder) is not None


def test_a_link_is_left_alone(tmp_path: Path) -> None:
    archive = checkpoint(tmp_path / "archive")
    link = tmp_path / "step_00000007"
    link.symlink_to(archive)
    discard(link)
    assert link.is_symlink() and (archive / MANIFEST_NAME).exists()
