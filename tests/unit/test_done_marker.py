"""When a run counts as finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ove.training.done_marker import is_done, mark_done, unmark_done

TEXT = "train: {num_steps: 6}\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints/step_00000006").mkdir(parents=True)
    mark_done(tmp_path, step=6, config_text=TEXT)
    return tmp_path


def test_a_finished_run_is_done_until_it_is_trained_further(run_dir: Path) -> None:
    assert is_done(run_dir, num_steps=6, config_text=TEXT)
    unmark_done(run_dir)
    unmark_done(run_dir)
    assert not is_done(run_dir, num_steps=6, config_text=TEXT)


@pytest.mark.parametrize(("num_steps", "text"), [(7, TEXT), (6, TEXT + "seed: 2\n"), (5, "train: {num_steps: 5}\n")])
def test_another_length_or_configuration_is_not_done(run_dir: Path, num_steps: int, text: str) -> None:
    assert not is_done(run_dir, num_steps=num_steps, config_text=text)


def test_a_run_whose_checkpoint_was_deleted_is_not_done(run_dir: Path) -> None:
    (run_dir / "checkpoints/step_00000006").rmdir()
    assert not is_done(run_dir, num_steps=6, config_text=TEXT)


@pytest.mark.parametrize(
    "content",
    ["", "{", "6", "[]", '{"step": "6"}', '{"step": null}'] + [f'{{"step": {step}}}' for step in ("6.5", "true")],
)
def test_a_file_that_is_no_marker_is_not_done(run_dir: Path, content: str) -> None:
    (run_dir / "done").write_text(content)
    assert not is_done(run_dir, num_steps=6, config_text=TEXT)
