"""The page: self-contained, escaped, complete; pictures drawn right; errors as sentences."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ove.errors import DataError
from megatron_ove.rejects import RejectsFile
from megatron_ove.report.pictures import draw_boxes, save_jpeg, tile
from megatron_ove.report.run_report import write_run_report
from megatron_ove.report.sections import (
    GalleryBlock,
    GalleryRow,
    Picture,
    PictureBlock,
    ReportExtras,
    Section,
    StepMarker,
    TableBlock,
    Word,
    WordBlock,
    WordColumn,
    read_extras,
    write_extras,
)


class TagBalance(HTMLParser):
    """Collects images and checks that every element that needs an end tag gets it, in order."""

    VOID = frozenset({"meta", "img", "br", "line"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.urls += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def make_run(folder: Path) -> Path:
    rows = [{"step": s, "loss/pages": 20.0 - s / 10, "lr": 1e-3, "samples_per_s": 30.0} for s in range(1, 101)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.resolved.yaml").write_text("name: <b>quick</b>\n")
    return folder


def sample_extras(folder: Path) -> ReportExtras:
    save_jpeg(np.full((20, 30, 3), 200, np.uint8), folder / "report/page.jpg")
    picture = Picture(file="page.jpg", alt='a "page"', caption="p < 1")
    return ReportExtras(
        title="Quick start",
        introduction="What & why",
        highlights=[("3.1 min", "all phases")],
        markers=[StepMarker(step=50, label="stopped, continued")],
        sections=[
            Section(
                title="Pages",
                text="One.\n\nTwo.",
                blocks=[
                    PictureBlock(items=[picture], size="half"),
                    GalleryBlock(
                        rows=[
                            GalleryRow(
                                label="before",
                                query=picture,
                                found=[Picture(**{**picture.model_dump(), "right": False})],
                            )
                        ]
                    ),
                    WordBlock(
                        columns=[WordColumn(title="after", words=[Word(text="été <x>", right=True, note="0.91")])]
                    ),
                    TableBlock(header=["what", "before", "after"], rows=[["pages", "0.1", "0.8"]], note="held-out"),
                ],
            )
        ],
    )


def test_page_is_selfcontained_wellformed_and_complete(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_extras(folder, sample_extras(folder))
    with RejectsFile(folder / "rejects.jsonl", stage="ocr") as rejects:
        rejects.add("a.jpg", "no text")
    path = write_run_report(folder)
    page = path.read_text()
    assert path == (folder / "report.html").resolve()
    parser = TagBalance()
    parser.feed(page)
    assert not parser.open
    assert parser.urls and all(url.startswith("data:image/jpeg;base64,") for url in parser.urls)
    assert all(image["alt"] == 'a "page"' and image["width"] == "30" for image in parser.images)
    assert len(parser.images) == 3
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    for text in (
        "Quick start",
        "What &amp; why",
        "3.1 min",
        "Loss: pages",
        "Throughput",
        "stopped, continued",
        "p &lt; 1",
        "été &lt;x&gt;",
        "&lt;b&gt;quick",
        "records left out",
        "-42.2 %",
    ):
        assert text in page, text


def test_page_of_a_bare_run_needs_only_metrics(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bare")
    (folder / "config.resolved.yaml").unlink()
    page = write_run_report(folder, tmp_path / "out/page.html").read_text()
    assert "Run bare" in page
    assert "Rejects" not in page


def test_page_shows_figures_on_held_out_data_and_chance(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert "On held-out data" not in write_run_report(folder).read_text()
    rows = [{"step": 10, "loss/pages": 9.0, "chance_loss/pages": 8.1, "effective_rank/pages": 3.0}]
    place = "held_out/pages"
    for step, precision in ((10, 0.1), (20, 0.3)):
        figures = {f"{place}/mean_average_precision": precision, f"{place}/chance_mean_average_precision": 0.02}
        rows.append({"step": step, **figures, f"{place}/samples": 40, "held_out_s": 1.5})
    rows.insert(1, {"step": 20, "phase_s/forward": 0.3, "phase_s/head": 0.1})
    rows.append({"step": 30, f"{place}/samples": 40})  # the last line says nothing about the time of a step
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_run_report(folder).read_text()
    parser = TagBalance()
    parser.feed(page)
    assert not parser.open
    assert "On held-out data" in page
    assert "Mean average precision: pages over steps 10 to 20: from 0.1 to 0.3, chance 0.02" in page
    assert "Loss: pages over steps 10 to 10: from 9 to 9, chance 8.1" in page
    assert "Effective rank: pages" in page
    assert "Where the time goes" in page


def test_page_shows_where_the_time_goes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert "Where the time goes" not in write_run_report(folder).read_text()
    early = {"step": 10, "phase_s/forward": 0.3, "phase_s/head": 0.1}
    late = {"step": 40, "phase_s/forward": 0.1, "phase_s/head": 0.1, "phase_s_max/forward": 0.15}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (early, late)))
    page = write_run_report(folder).read_text()
    parser = TagBalance()
    parser.feed(page)
    assert not parser.open
    # forward: 0.3 s for 10 steps, 0.1 s for 30
    assert '<th scope="row">forward</th><td>150.0</td><td>60.0 %</td>' in page
    assert '<th scope="row">head</th><td>100.0</td><td>40.0 %</td>' in page
    assert "Share of step time: forward 62 %, head 38 %" in page
    bottom, top = re.findall(r'style="fill:var\(--series-\d\)" d="M([^"]+)Z"', page)
    points = [[float(value) for value in point.split()] for point in bottom.split("L")]
    # over the plot's 162 units of height: 75 % at the first step, 50 % at the last; then back along 0 %
    assert points == [[50, 54.5], [708, 95], [708, 176], [50, 176]]
    assert [point.split()[1] for point in top.split("L")] == ["14.0", "14.0", "95.0", "54.5"]


def test_extras_survive_the_round_trip(tmp_path: Path) -> None:
    extras = sample_extras(tmp_path)
    write_extras(tmp_path, extras)
    assert read_extras(tmp_path) == extras


def test_report_errors_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to report; give the folder of a run that has trained"):
        write_run_report(tmp_path)
    folder = make_run(tmp_path / "run")
    write_extras(folder, sample_extras(folder))
    (folder / "report/page.jpg").unlink()
    with pytest.raises(DataError, match=r"page\.jpg, which does not exist; run the program that made the report again"):
        write_run_report(folder)
    (folder / "report/extras.json").write_text('{"sections": 3}')
    with pytest.raises(DataError, match=r"does not hold report extras \(sections: .*\); delete it to draw"):
        write_run_report(folder)


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/hostname", "notes.txt", "link.jpg"])
def test_a_page_shows_no_file_from_elsewhere(name: str, tmp_path: Path) -> None:
    """A run folder of somebody else draws no file of yours into a page that you may send back."""
    folder = make_run(tmp_path / "run")
    save_jpeg(np.zeros((8, 8, 3), np.uint8), tmp_path / "secret.png")
    write_extras(folder, sample_extras(folder))
    (folder / "report/notes.txt").write_text("mine")
    (folder / "report/link.jpg").symlink_to(tmp_path / "secret.png")
    extras = folder / "report/extras.json"
    extras.write_text(extras.read_text().replace("page.jpg", name))
    with pytest.raises(DataError, match="which is no picture in"):
        write_run_report(folder)


def test_tile_lays_out_row_by_row() -> None:
    frames = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = tile(frames, columns=2, gap=1)
    assert sheet.shape == (5, 7, 3)
    assert (sheet[0, 0, 0], sheet[0, 4, 0], sheet[3, 0, 0], sheet[3, 4, 0], sheet[2, 0, 0]) == (10, 20, 30, 255, 255)


def test_draw_boxes_outlines_and_leaves_the_rest(tmp_path: Path) -> None:
    page = np.full((60, 60, 3), 255, np.uint8)
    box = np.array([[10, 10], [40, 10], [40, 30], [10, 30]])
    drawn = draw_boxes(page, [box], [True])
    assert (drawn[50, 50] == 255).all()
    assert tuple(drawn[10, 25]) == (20, 120, 90)
    assert (page == 255).all()
    saved = save_jpeg(np.zeros((50, 100, 3), np.uint8), tmp_path / "x/a.jpg", longest_side=20)
    with Image.open(saved) as picture:
        assert picture.size == (20, 10)
