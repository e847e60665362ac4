"""The record of samples that could not be read, reads with retries, and files that many threads read at once."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ove.data import read_ahead
from megatron_ove.data.bad_samples import BadSample, known_bad, read_bad_samples, record_bad_samples
from megatron_ove.data.read_ahead import ReadAhead, read_patiently
from megatron_ove.errors import DataError
from megatron_ove.report.run_report import write_run_report
from megatron_ove.shards.files import ShardFiles
from megatron_ove.shards.shard_set import ReadError, ShardSet
from tests.support.id_shards import write_id_shard_set


def sample(step: int, ordinal: int, source: str = "pages") -> BadSample:
    return BadSample(step, source, ordinal, ordinal % 7, f"page-{ordinal % 7}", "it is gone; copy it again")


def test_records_come_back_whatever_a_kill_cut_off(tmp_path: Path) -> None:
    assert list(read_bad_samples(tmp_path)) == []
    record_bad_samples(tmp_path, 0, [sample(3, 20), sample(3, 21)])
    path = record_bad_samples(tmp_path, 1, [sample(2, 9), sample(5, 40)])
    assert path == tmp_path / "rejects/replica_00001.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    record_bad_samples(tmp_path, 1, [sample(6, 41)])
    assert list(read_bad_samples(tmp_path)) == [sample(3, 20), sample(3, 21), sample(2, 9), sample(6, 41)]


def test_only_the_steps_to_come_are_known() -> None:
    """Records count steps from 1, as metrics do; the loader counts from 0."""
    records = [sample(3, 20), sample(4, 30), sample(4, 31, "images"), sample(5, 40)]
    assert known_bad(records, start_step=3) == {
        3: frozenset({("pages", 30), ("images", 31)}),
        4: frozenset({("pages", 40)}),
    }


@pytest.mark.parametrize("line", [b"nonsense\n", b'{"step": 3}\n', b'{"step": 3, "file": "x"}\n', b"[1]\n"])
def test_another_file_is_not_taken_for_records(tmp_path: Path, line: bytes) -> None:
    path = record_bad_samples(tmp_path, 0, [sample(3, 20)])
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(DataError, match=r"line 2 of .*replica_00000\.jsonl is no record of a bad sample, so the file"):
        list(read_bad_samples(tmp_path))


def test_a_record_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "rejects").write_text("in the way")
    with pytest.raises(
        DataError, match=r"replica_00000\.jsonl, which names the samples .* cannot be written \(File exi"
    ):
        record_bad_samples(tmp_path, 0, [sample(3, 20)])


def test_the_report_lists_them_by_source(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "samples": 8, "loss": 1.0, "time": 0.0}\n')
    record_bad_samples(tmp_path, 0, [sample(3, 20), sample(3, 21), sample(4, 2, "images")])
    page = write_run_report(tmp_path).read_text()
    assert "samples that could not be read in training" in page
    for text in ("pages", "images", str((tmp_path / "rejects").resolve())):
        assert text in page


def open_files(folder: Path) -> int:
    """Returns how many files below `folder` this process has open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own
            found += str(link.readlink()).startswith(str(folder))
    return found


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return ShardSet.open(write_id_shard_set(tmp_path / "set", "image", 12))


def failing(times: int, fail: Callable[[int, int, int], bytes]) -> Callable[[int, int, int], bytes]:
    left = [times]

    def pread(handle: int, size: int, offset: int) -> bytes:
        left[0] -= 1
        return fail(handle, size, offset) if left[0] >= 0 else os.pread(handle, size, offset)

    return pread


def stale(handle: int, size: int, offset: int) -> bytes:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def short(handle: int, size: int, offset: int) -> bytes:
    return os.pread(handle, size - 1, offset)


@pytest.mark.parametrize("fail", [stale, short])
def test_three_failures_are_forgiven(shards: ShardSet, monkeypatch: pytest.MonkeyPatch, fail) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(read_ahead.time, "sleep", pauses.append)
    expected = shards.read(3, "jpg")
    shards.files.pread = failing(3, fail)  # type: ignore[method-assign]
    assert read_patiently(shards, 3, "jpg") == expected
    assert pauses == list(read_ahead.PAUSES_S)
    shards.files.pread = failing(4, fail)  # type: ignore[method-assign]
    with pytest.raises(ReadError, match=r"jpg of sample 'image3' \(number 3\) of .*\.tar (cannot be read|ends after)"):
        read_patiently(shards, 3, "jpg")


def test_a_stale_handle_is_opened_anew(shards: ShardSet) -> None:
    shards.read(0, "jpg")
    assert open_files(shards.directory / "shards") == 1
    shards.files.pread = failing(1, stale)  # type: ignore[method-assign]
    with pytest.raises(ReadError):
        shards.read(0, "jpg")
    assert open_files(shards.directory / "shards") == 0
    assert shards.read(0, "jpg")


def test_a_member_is_read_once_a_step_and_only_when_asked_for(shards: ShardSet) -> None:
    offsets: list[int] = []

    def pread(handle: int, size: int, offset: int) -> bytes:
        offsets.append(offset)
        return os.pread(handle, size, offset)

    shards.files.pread = pread  # type: ignore[method-assign]
    pool = ReadAhead([shards], 4)
    read = pool.start([(0, 5, "jpg"), (0, 2, "jpg"), (0, 5, "jpg")]).reader_of(0)
    assert read(5, "jpg") == read(5, "jpg") != read(2, "jpg")
    pool.close()
    assert len(offsets) == 2


def test_no_lock_is_held_while_reading(tmp_path: Path) -> None:
    """All reads are in progress at one time, or the barrier breaks."""
    paths = [tmp_path / str(number) for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 4)
    barrier = threading.Barrier(12, timeout=30)
    files = ShardFiles(paths.__getitem__, most_open=2)

    def pread(handle: int, size: int, offset: int) -> bytes:
        barrier.wait()
        return os.pread(handle, size, offset)

    files.pread = pread  # type: ignore[method-assign]
    found: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, files.read(i % 6, 4, 0))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: bytes([i % 6]) * 4 for i in range(12)}
    assert open_files(tmp_path) == 2  # none is lost, and no more stay open than may
    files.close()
    assert open_files(tmp_path) == 0


def test_files_closed_while_in_use_are_closed_by_their_last_reader(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"abcd")
    files = ShardFiles(lambda number: tmp_path / str(number))

    def pread(handle: int, size: int, offset: int) -> bytes:
        files.close()
        return os.pread(handle, size, offset)

    files.pread = pread  # type: ignore[method-assign]
    assert files.read(0, 4, 0) == b"abcd"
    assert open_files(tmp_path) == 0
