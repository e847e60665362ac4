"""A tool that is stopped, by whatever, keeps what it did, and the same command continues; its sentence is shown."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ove.preprocess.clustering.descriptor_sets import DescriptorSet, PictureDescriber
from megatron_ove.preprocess.input_files import InputFile
from tests.support.clips import textured_background
from tests.support.tool_scripts import run_script


def stop_by(cause: signal.Signals | int) -> None:
    if isinstance(cause, signal.Signals):
        # Whoever starts the tests in the background of a script has them ignore Ctrl-C.
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            signal.raise_signal(cause)
        finally:
            signal.signal(signal.SIGINT, before)
    else:
        raise OSError(cause, "No space left on device", "/tmp/x")


@pytest.mark.parametrize(
    ("cause", "status", "sentence"),
    [
        (signal.SIGINT, 130, "interrupted; what is finished is kept"),
        (signal.SIGTERM, 143, "interrupted; what is finished is kept"),
        (errno.ENOSPC, 2, "cannot be used (No space left on device)"),
    ],
)
def test_described_pictures_are_kept(
    cause: signal.Signals | int,
    status: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.fromarray(np.roll(textured_background(40, 60), 9 * number, 1)).save(tmp_path / f"in/{number}.png")
    describe, handler = PictureDescriber.__call__, signal.getsignal(signal.SIGTERM)

    def stop_at_2(self: PictureDescriber, file: InputFile) -> np.ndarray:
        if file.name == "2.png":
            stop_by(cause)
        return describe(self, file)

    arguments = [tmp_path / "in", tmp_path / "d.npz", "--workers", 1, "--rejects", tmp_path / "rejects.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(PictureDescriber, "__call__", stop_at_2)
        assert run_script("clustering/1_describe_pictures.py", *arguments) == status
    assert sentence in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(DescriptorSet.load(tmp_path / "d.npz").descriptors) == 2
    assert run_script("clustering/1_describe_pictures.py", *arguments) == 0
    assert "(2 new, 2 kept), 0 rejected" in capsys.readouterr().out
    assert len(DescriptorSet.load(tmp_path / "d.npz").descriptors) == 4


def test_a_name_that_is_not_utf8_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("ocr/2_build_vocabulary.py", "absent\udcff.jsonl", "--output", "v.json") == 2
    assert r"error: absent\udcff.jsonl does not exist; make it with" in capsys.readouterr().err
