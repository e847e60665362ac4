"""Charts and the metrics log: ticks, smoothing, thinning, cut-off files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megatron_ove.errors import DataError
from megatron_ove.report.curves import Level, Marker, format_number, line_chart, round_ticks, smoothed, thin
from megatron_ove.report.metrics_log import read_metrics


def write_log(path: Path, rows: list[dict[str, float]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (3.2, 17.9, [0, 5, 10, 15, 20]),
        (0, 0.0007, [0, 0.0002, 0.0004, 0.0006, 0.0008]),
        (4, 4, [2, 3, 4, 5, 6]),
    ],
)
def test_round_ticks_enclose_the_data(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high, 4) == pytest.approx(ticks)


def test_smoothed_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert smoothed([3.0] * 5, 4) == pytest.approx([3.0] * 5)
    # span 2 keeps half: (0.5 * 1 + 5) / 1.5
    assert smoothed([1.0, 5.0], 2) == pytest.approx([1.0, 5.5 / 1.5])


def test_thin_averages_neighbours() -> None:
    assert thin([0, 1, 2, 3, 4], [10, 20, 30, 40, 50], 2) == ([1.0, 3.5], [20.0, 45.0])


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.4, "1,234"), (0.00025, "2.5e-4"), (0.1, "0.1"), (19.2, "19.2")]
)
def test_format_number(value: float, text: str) -> None:
    assert format_number(value) == text


def test_line_chart_is_wellformed_escaped_and_draws_to_scale() -> None:
    figure = line_chart(
        [0, 50, 100], [4.0, 2.0, 0.0], title="a < b", unit="nats", smooth=False, markers=[Marker(50, "stopped")]
    )
    root = ElementTree.fromstring(figure)
    assert root.findtext("figcaption", "").startswith("a < b")
    svg = root.find("svg")
    assert svg is not None
    assert svg.get("aria-label") == "a < b over steps 0 to 100: from 4 to 0 nats"
    path = svg.findall("path")[-1].get("d", "")
    points = [tuple(map(float, pair.split())) for pair in path.removeprefix("M").split("L")]
    assert points[1] == pytest.approx(((points[0][0] + points[2][0]) / 2, (points[0][1] + points[2][1]) / 2), abs=0.06)
    assert points[0][1] < points[2][1]  # y grows downwards: the larger value is higher
    assert "stopped" in "".join(svg.itertext())


def test_line_chart_of_zeros_starts_at_zero() -> None:
    figure = ElementTree.fromstring(line_chart([1, 2], [0.0, 0.0], title="padding", from_zero=True))
    assert not [text for text in figure.itertext() if text.startswith("-")]


def test_line_chart_without_values_says_so() -> None:
    assert "not logged" in line_chart([], [], title="loss")


def test_later_line_of_a_step_wins_and_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss/a": 9.0}, {"step": 2, "loss/a": 8.0}, {"step": 2, "loss/a": 7.0}]
    log = read_metrics(write_log(tmp_path / "m.jsonl", rows, '{"step": 3, "lo'))
    assert log.series("loss/a") == ([1.0, 2.0], [9.0, 7.0])
    assert log.objectives == ["a"]


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    path = write_log(tmp_path / "m.jsonl", [{"step": 1, "lr": float("nan")}, {"step": 2, "lr": 0.1}])
    assert read_metrics(path).series("lr") == ([2.0], [0.1])


def test_loss_change_uses_both_ends(tmp_path: Path) -> None:
    rows = [{"step": step, "loss/a": float(100 - step)} for step in range(1, 61)]
    change = read_metrics(write_log(tmp_path / "m.jsonl", rows)).loss_change("a")
    assert (change.window_steps, change.first_loss, change.last_loss) == (20, 89.5, 49.5)
    assert change.fall == pytest.approx(1 - 49.5 / 89.5)
    short = read_metrics(write_log(tmp_path / "s.jsonl", rows[:6])).loss_change("a")
    assert (short.window_steps, short.first_loss, short.last_loss) == (3, 98.0, 95.0)


def test_loss_change_weighs_rows_by_the_steps_they_stand_for(tmp_path: Path) -> None:
    rows = [{"step": 10, "loss/a": 9.0}, {"step": 15, "loss/a": 6.0}, {"step": 20, "loss/a": 6.0}]
    rows += [{"step": 60, "loss/a": 5.0}, {"step": 70, "loss/a": 4.0}, {"step": 80, "loss/a": 2.0}]
    change = read_metrics(write_log(tmp_path / "m.jsonl", rows)).loss_change("a")
    assert (change.first_loss, change.last_loss) == (7.5, 3.0)


def test_metrics_errors_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist, so there is nothing to report; give the folder of a run"):
        read_metrics(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no finished step"):
        read_metrics(write_log(tmp_path / "empty.jsonl", [], '{"step"'))
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_metrics(write_log(tmp_path / "bad.jsonl", [], 'x\n{"step": 2}\n'))
    log = read_metrics(write_log(tmp_path / "m.jsonl", [{"step": 1, "loss/a": float("inf")}]))
    with pytest.raises(DataError, match="no finite loss of objective 'a' was logged"):
        log.loss_change("a")


def test_a_level_is_a_dashed_line_that_the_axis_reaches() -> None:
    figure = line_chart([0, 10], [1.0, 2.0], title="loss", smooth=False, level=Level(8.0, "chance"))
    svg = ElementTree.fromstring(figure).find("svg")
    assert svg is not None
    assert svg.get("aria-label") == "loss over steps 0 to 10: from 1 to 2, chance 8"
    (line,) = (line for line in svg.findall("line") if line.get("class") == "level")
    assert line.get("y1") == line.get("y2") == "14.0"  # the top of the plot
    assert "chance 8" in [text.text for text in svg.findall("text")]
    assert len(svg.findall("circle")) == 2


def test_one_point_can_be_seen() -> None:
    svg = ElementTree.fromstring(line_chart([5], [0.4], title="first", smooth=False, from_zero=True)).find("svg")
    assert svg is not None and len(svg.findall("circle")) == 1


def test_lines_of_one_step_are_put_together(tmp_path: Path) -> None:
    rows = [{"step": 2, "loss/pages": 3.0}, {"step": 2, "held_out/pages/recall_at_10": 0.5, "time": 1.0}]
    rows.append({"step": 2, "held_out/pages/chance_recall_at_10": 0.1, "held_out/pages/samples": 9})
    log = read_metrics(write_log(tmp_path / "metrics.jsonl", rows))
    assert log.series("loss/pages") == ([2.0], [3.0])
    assert log.series("held_out/pages/recall_at_10") == ([2.0], [0.5])
    assert log.held_out == {"pages": ["recall_at_10"]}
