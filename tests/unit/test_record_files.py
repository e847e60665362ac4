"""What was found in a file counts while the file is as it was, and once, wherever it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess import record_files
from megatron_ove.preprocess.clustering.descriptor_sets import (
    DescriptorSet,
    LabelSet,
    SampleFiles,
    clip_describer_name,
)
from megatron_ove.preprocess.folders import list_inputs
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.record_files import as_record, continue_records, current_rows, file_state
from tests.support.tool_scripts import run_script

STEP = "tools/ocr/1_recognize_pages.py"


def write_pages(folder: Path, num: int) -> list[dict[str, object]]:
    """Writes files; returns records of them, with keys of their folder and the line "law right"."""
    folder.mkdir()
    records = []
    for number in range(num):
        path = folder / f"{number}.png"
        path.write_bytes(bytes(number))
        item = InputFile(path, path.name, f"{folder.name}-{number}")
        records.append({**as_record(item), "lines": [{"text": "law right"}]})
    return records


def renamed(tmp_path: Path, num: int = 3) -> list[dict[str, object]]:
    """Returns records of a folder that was renamed and looked at again: each file twice."""
    before = write_pages(tmp_path / "before", num)
    (tmp_path / "before").rename(tmp_path / "gone")
    return before + write_pages(tmp_path / "now", num)


def test_a_renamed_folder_is_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = renamed(tmp_path)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    build = [tmp_path / "lines.jsonl", "--output", tmp_path / "words.json"]
    assert run_script("ocr/2_build_vocabulary.py", *build) == 0
    sentence = f"the first: {tmp_path}/before/0.png is not there any more; put it back, or run"
    output = capsys.readouterr().out
    assert f"3 of 6 pages are left out; {sentence} {STEP} again" in output
    assert "2 words of 3 pages" in output

    vectors = np.eye(6, dtype=np.float32)
    cluster = [tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 2, "--centers", tmp_path / "c.npz"]
    for describer, num_left in (("colours", 3), (clip_describer_name("colours", 4), 6)):
        DescriptorSet(SampleFiles.from_records(records), vectors, describer).save(tmp_path / "d.npz")
        assert run_script("clustering/2_cluster_descriptors.py", *cluster) == 0
        output = capsys.readouterr().out
        # A stored clip does not need its video any more.
        assert (f"3 of 6 pictures are left out; {sentence}" in output) == (num_left == 3)
        labelled = LabelSet.load(tmp_path / "l.npz")
        assert labelled.samples.keys.tolist() == [record["key"] for record in records[-num_left:]]
        assert len(labelled.labels) == num_left


def test_where_nothing_is_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 2 pages is as it was when it was looked at; the first: /gone is"):
        current_rows([("/gone", [1, 2]), ("/gone", [3, 4])], what="pages", step=STEP)
    assert current_rows([("/gone", None)], what="pages", step=STEP) == ([0], "")
    assert current_rows([], what="pages", step=STEP) == ([], "")


def test_many_files_stay_in_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    state = file_state(tmp_path / "a")
    looked_at = [(str(tmp_path / "a"), state if row % 3 else [0, 0]) for row in range(1000)]
    rows, left_out = current_rows(looked_at, what="pages", step=STEP)
    assert rows == [row for row in range(1000) if row % 3]
    assert left_out.startswith("334 of 1000 pages are left out; the first: ")


def test_records_of_sheets_that_are_gone_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "scan.tif").write_text("two sheets")
    items = [InputFile(tmp_path / "scan.tif", "scan.tif", f"scan-{sheet}", sheet) for sheet in range(3)]
    earlier = [as_record(item) for item in items]
    elsewhere = {"key": "other", "file": "/elsewhere/b.tif", "sheet": 2, "file_state": [1, 2]}
    plan = continue_records([*earlier, elsewhere], items[:2])
    assert (plan.kept, plan.elsewhere, plan.todo, plan.num_gone_sheets) == (earlier[:2], [elsewhere], [], 1)
    assert plan.counts(0) == "0 new, 2 kept, 1 of elsewhere kept, 1 dropped of sheets that are gone"


def test_no_file_is_asked_for_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server takes half a millisecond for a question, which is days for hundreds of millions of files."""
    write_pages(tmp_path / "A", 20)
    inputs = list_inputs(tmp_path / "A", "picture").inputs
    (tmp_path / "link").symlink_to(tmp_path / "A")
    records = [as_record(item) for item in inputs]
    by_link = [{**record, "file": str(tmp_path / "link" / Path(record["file"]).name)} for record in records]
    elsewhere = [{**record, "file": f"/elsewhere/{i}.png", "key": f"e{i}"} for i, record in enumerate(records)]
    monkeypatch.setattr(record_files, "file_state", lambda path: pytest.fail("a file is looked at again"))
    resolved, real_path = [], record_files.real_path
    monkeypatch.setattr(record_files, "real_path", lambda path: resolved.append(str(path)) or real_path(path))
    assert [as_record(item) for item in inputs] == records
    assert continue_records(records, inputs).kept == records
    assert resolved == []
    plan = continue_records(by_link + elsewhere, inputs)
    assert (plan.kept, plan.elsewhere, plan.todo) == (by_link, elsewhere, [])
    assert resolved == [str(tmp_path / "link"), "/elsewhere"]
