"""Who prints the sentence of an error that all ranks of a machine have."""

from __future__ import annotations

import pytest

from megatron_ove.cli import main as command_line
from megatron_ove.errors import ConfigError


@pytest.mark.parametrize(
    ("rank", "local_rank", "on_every_rank", "is_printed"),
    [
        (0, "0", True, True),
        (1, "1", True, False),
        (8, "0", True, True),  # first rank of a second machine, which may miss a file that the first one has
        (1, "1", False, True),
        (1, None, True, False),  # a launcher that sets no LOCAL_RANK
    ],
)
def test_a_sentence_is_printed_once_on_every_machine(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    local_rank: str | None,
    on_every_rank: bool,
    is_printed: bool,
) -> None:
    monkeypatch.setattr(command_line, "_REPEAT_DELAY_S", 0.0)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    error = ConfigError("no such file")
    error.on_every_rank = on_every_rank
    command_line._print_sentence(error, rank, 16)
    expected = f"megatron-ove: [rank {rank}] no such file\n" if is_printed else ""
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "3", "WORLD_SIZE": "2"},
            "the environment has RANK = 3 and WORLD_SIZE = 2, but ranks are counted from 0 to WORLD_SIZE - 1, so the "
            "others would wait for ever",
        ),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "the environment has RANK = 0 and WORLD_SIZE = 0, but ranks are counted"),
        ({"LOCAL_RANK": "x"}, "the environment has LOCAL_RANK = 'x', which is no number"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "abc"},
            "the environment has MASTER_PORT = 'abc', which is no",
        ),
    ],
)
def test_a_place_in_the_world_that_cannot_be_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command_line.main(["inspect", "nowhere"]) == 2
    assert f"megatron-ove: {message}" in capsys.readouterr().err
