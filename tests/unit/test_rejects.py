"""rejects.jsonl: every rejected record with file and reason, still readable after a kill, counted in the summary."""

from __future__ import annotations

import errno
import json
import os
import sys
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess import file_runs
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.folders import list_inputs
from megatron_ove.preprocess.ocr.recognition import read_pages
from megatron_ove.preprocess.record_files import file_state, open_rejects, read_records, require_same_settings
from megatron_ove.rejects import RejectsFile, count_rejects, read_rejects

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"


def write_three(path: Path) -> Path:
    for stage, file in (("ocr", "a.jpg"), ("ocr", "b.jpg"), ("clips", "c.mp4")):
        with RejectsFile(path, stage=stage) as rejects:
            rejects.add(file, "it is empty")
    return path


def test_file_and_reason_are_kept_and_counted_per_stage(tmp_path: Path) -> None:
    path = write_three(tmp_path / "new" / "rejects.jsonl")
    assert read_rejects(path)[0] == {"stage": "ocr", "file": "a.jpg", "reason": "it is empty"}
    assert count_rejects(path) == {"ocr": 2, "clips": 1}
    assert count_rejects(tmp_path / "none.jsonl") == {}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo's module that writes summary.json; it is a script's neighbour, not a package."""
    monkeypatch.syspath_prepend(str(QUICKSTART))
    before = set(sys.modules)
    import results

    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(QUICKSTART)):
            monkeypatch.delitem(sys.modules, name)
    return results


def test_the_summary_counts_rejects(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_three(tmp_path / "rejects.jsonl")
    monkeypatch.setattr(results, "_data", lambda run_dir: {})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "samples": 8, "loss": 1.0, "time": 0.0}\n')
    config = SimpleNamespace(objectives={}, train=SimpleNamespace(num_steps=1))
    outcome = SimpleNamespace(export_difference={"all": 0.0}, figures={stage: {} for stage in results.STAGES})
    reading = results.CardReading()
    results.write_summary(tmp_path, config, outcome, reading=reading, stopped_at=1, seconds={"training": 1.0})
    assert json.loads((tmp_path / "summary.json").read_text())["rejects"] == {"ocr": 2, "clips": 1}


def test_a_line_cut_off_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    path = write_three(tmp_path / "rejects.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    with RejectsFile(path, stage="images") as rejects:
        rejects.add("d.jpg", "it is not a picture")
    assert count_rejects(path) == {"ocr": 2, "images": 1}
    with open_rejects(path, stage="ocr", files=["a.jpg"]):
        pass
    assert [record["file"] for record in read_rejects(path)] == ["b.jpg", "d.jpg"]


@pytest.mark.parametrize(
    "content", [b"nonsense\n", b'{"file": "a.jpg"}\n', b"[1]\n", b"[" * 100_000, b"\xff\xd8\xff\xe0\x00"]
)
def test_another_file_is_not_taken_for_rejects(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine"
    path.write_bytes(content)
    sentence = r"line 1 of .*mine is no record of a rejected file, so the file is something"
    with pytest.raises(DataError, match=sentence), open_rejects(path, stage="ocr", files=[]):
        pass
    assert path.read_bytes() == content


def touch(file: Path) -> str:
    return file.name


def fail(file: Path) -> str:
    raise OSError(errno.EACCES if file.name == "a.jpg" else errno.ENOSPC, "refused", str(file))


def run(make_task, files: list[Path], path: Path, workers: int = 1) -> list[str]:
    with RejectsFile(path, stage="images") as rejects:
        return [result for _, result in run_over_files(make_task, files, title="t", workers=workers, rejects=rejects)]


def make_touch():
    return touch


def make_fail():
    return fail


def test_a_name_that_is_not_utf8_is_rejected_and_the_others_go_on(tmp_path: Path) -> None:
    for name in (b"bad\xff.jpg", "gr\u00fc\u00df e [1].jpg".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    files = list_inputs(tmp_path, "picture").inputs
    assert len({file.key for file in files}) == 2
    assert run(make_touch, [file.path for file in files], tmp_path / "rejects.jsonl") == ["gr\u00fc\u00df e [1].jpg"]
    (record,) = read_rejects(tmp_path / "rejects.jsonl")
    assert record["file"].endswith(r"bad\udcff.jpg")
    assert record["reason"].endswith(r"bad\udcff.jpg is not UTF-8, so records cannot hold it; rename the file")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_the_work_instead_of_rejecting_every_file(tmp_path: Path, workers: int) -> None:
    files = [tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "c.jpg"]
    with pytest.raises(OSError, match="refused") as caught:
        run(make_fail, files, tmp_path / "rejects.jsonl", workers)
    assert caught.value.errno == errno.ENOSPC
    (record,) = read_rejects(tmp_path / "rejects.jsonl")
    assert record["reason"] == f"{files[0]} could not be processed (refused); check the path and its permissions"


def test_a_link_to_nothing_has_a_state_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone")
    assert file_state(tmp_path / "link.jpg") == [-1, -1]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"key": "a"}\n{"key": "b"}\n', "line 1 of .* has no file, so the file is something else; give a file made"),
        (b"[]\n", "line 1 of .* has no key, file, so the file is something else"),
        (b"\x9d\x00\n", r"line 1 of .* is not JSON \(.*\); make the file again with tools/x\.py"),
        (b'{"key": \n{"key": "b", "file": "c"}\n', "line 1 of .* is not JSON"),
        (b"[" * 100_000 + b"\n", "line 1 of .* is not JSON"),
        (
            rb'{"key": "a", "file": "a\u0000.png"}' + b"\n",
            r"line 1 of .* has the file 'a\\x00.png', but no file can be",
        ),
        (
            rb'{"key": "a", "file": "\ud800.png"}' + b"\n",
            r"line 1 of .* has the file '\\ud800.png', but no file can be",
        ),
    ],
)
def test_records_of_another_kind_are_refused(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "lines.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=text):
        read_records(tmp_path / "lines.jsonl", made_by="tools/x.py", fields=("key", "file"))


CUT = '{"key": "a", "file": "b", "run_settings": {}, "lines": []}\n{"key": "c", "fi'


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"file_state": 5},
            r"line 1 of .* has the file_state 5, which is not \[bytes, modification time in ns\]; correct",
        ),
        ({"file_state": [1, None]}, r"line 1 of .* has the file_state \[1, None\], which"),
        ({"file": 5}, r"line 1 of .* has the key 'a' and the file 5, which are no names"),
        ({"key": ["a"]}, r"line 1 of .* has the key \['a'\] and the file 'b', which are no names"),
    ],
)
def test_records_of_ours_with_a_field_of_another_form_are_refused(
    change: dict[str, object], text: str, tmp_path: Path
) -> None:
    record = {"key": "a", "file": "b", "file_state": [1, 2], **change}
    (tmp_path / "lines.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=text):
        read_records(tmp_path / "lines.jsonl", made_by="tools/x.py", fields=("key", "file", "file_state"))


def test_a_folder_is_no_file_of_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path} is no file; make it with tools/x\.py"):
        read_records(tmp_path, made_by="tools/x.py")


def test_settings_of_another_form_are_other_settings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"made with other settings \(engine None there, rapidocr now\)"):
        require_same_settings([{"run_settings": 5}], "run_settings", {"engine": "rapidocr"}, tmp_path)


def test_a_last_record_cut_off_by_a_kill_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(CUT)
    records = read_records(path, made_by="tools/x.py", fields=("key", "file"), may_be_cut=True)
    assert [record["key"] for record in records] == ["a"]
    assert [page.key for page in read_pages(path)] == ["a"]  # it has settings, so step 1 wrote it


def test_a_last_record_that_is_broken_otherwise_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(CUT + "\n")
    with pytest.raises(DataError, match=r"line 2 of .* is not JSON .*; make the file again with tools/x\.py"):
        read_records(path, made_by="tools/x.py", may_be_cut=True)
    path.write_text(CUT)
    with pytest.raises(DataError, match=r"line 2 of .* is not JSON"):
        read_records(path, made_by="tools/x.py")
    path.write_text(CUT.replace('"run_settings": {}, ', ""))  # of a user, who may have lost the end of the line
    with pytest.raises(DataError, match=r"line 2 of .* is not JSON"):
        read_pages(path)


def test_no_more_results_wait_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []

    class Pool:
        def __init__(self, *arguments, **options) -> None:
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            pass

        def shutdown(self, **options) -> None:
            pass

        def submit(self, call, files):
            submitted.append(files)
            done = Future()
            done.set_result([(file, None) for file in files])
            return done

    monkeypatch.setattr(file_runs, "ProcessPoolExecutor", Pool)
    seen = []
    for file, (result, _) in file_runs._outcomes(int, range(100), workers=2, chunk=3):
        assert file == result
        seen.append(file)
        assert len(submitted) <= (len(seen) - 1) // 3 + 8, "four chunks a worker"
    assert seen == list(range(100))
