"""What a run shows and keeps: progress lines, metrics.jsonl, TensorBoard, stop requests, counters."""

from __future__ import annotations

import io
import json
import logging
import os
import signal

import pytest
from rich.console import Console

from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import ConfigError
from megatron_ove.training import loggers
from megatron_ove.training.loggers import JsonLinesLogger, TensorBoardLogger, build_loggers, truncate_metrics
from megatron_ove.training.progress import ProgressDisplay, describe_held_out, describe_row
from megatron_ove.training.stop_signal import StopSignal, clear_stop_file
from megatron_ove.training.train_state import TrainState, sampler_state

ROW = {
    "step": 3,
    "samples": 24,
    "grad_norm": 1.25,
    "grad_norm/pages": 0.5,
    "loss": 12.3456,
    "loss/images": 7.5,
    "loss/pages": 4.8456,
    "lr": 1e-3,
    "samples_per_s": 8.04,
    "tokens_per_s": 512.0,
    "data_wait_share": 0.07,
    "refused_steps": 0,
    "time": 1.7e9,
}


def config(tmp_path, **tracking) -> TrainConfig:
    return config_from_dict(
        {
            "name": "test",
            "run_dir": str(tmp_path),
            "encoder": {"hidden_size": 64, "num_layers": 4, "num_attention_heads": 2, "ffn_hidden_size": 128},
            "objectives": {"clusters": {"kind": "partial_fc", "source": "images", "num_classes": 100}},
            "data": {"sources": {"images": {"kind": "image", "path": "data/images"}}},
            "train": {"num_steps": 10, "global_batch_size": 8},
            "tracking": tracking,
        },
        "test",
    )


def test_a_row_is_one_line_with_loss_per_head_and_throughput():
    assert describe_row(ROW) == (
        "loss 12.3456 (images 7.500, pages 4.846)  grad norm 1.25  lr 1.00e-03  8.0 samples/s  512 tokens/s  "
        "data wait 7 %"
    )
    shares = {"data": 0.07, "forward": 0.2, "backward": 0.4, "head": 0.1, "optimizer": 0.03, "communication": 0.15}
    timed = {f"phase_share/{phase}": share for phase, share in (shares | {"other": 0.05}).items()}
    assert describe_row({"lr": 0.1, "data_wait_share": 0.07, **timed}) == (
        "lr 1.00e-01  data wait 7 %  fwd/bwd/head/opt/comm/other 20/40/10/3/15/5 %"
    )
    assert describe_row({"step": 1, "refused_steps": 2.0, "lr": 0.1}) == "lr 1.00e-01  refused steps 2"


HELD_OUT = {
    "step": 4,
    "held_out/images/mean_average_precision": 0.4125,
    "held_out/images/first_right": 0.5,
    "held_out/images/recall_at_10": 0.75,
    "held_out/images/chance_mean_average_precision": 0.00312,
    "held_out/images/chance_first_right": 0.01,
    "held_out/images/chance_recall_at_10": 0.1,
    "held_out/images/samples": 99.0,
    "held_out/images/bad_samples": 1.0,
    "held_out/pages/samples": 0.0,
    "held_out/pages/bad_samples": 0.0,
    "held_out_s": 2.34,
    "time": 1.7e9,
}


def test_figures_on_held_out_data_are_one_line():
    assert describe_held_out(HELD_OUT) == (
        "held out (chance in brackets): images mAP 0.412 (0.0031), first right 0.500 (0.01), recall at 10 0.750 (0.1), "
        "99 samples, 1 unreadable; pages, 0 samples; 2.3 s"
    )


def test_figures_on_held_out_data_stay_below_the_others_on_a_terminal():
    stream = io.StringIO()
    display = ProgressDisplay(num_steps=10, start_step=2, console=Console(file=stream, force_terminal=True, width=200))
    display.report_held_out(HELD_OUT)
    display.report(ROW)
    display.close()
    last = stream.getvalue()[stream.getvalue().rindex("images 7.500") :]
    assert "step 4: held out (chance in brackets): images mAP 0.412 (0.0031)" in last


def test_without_a_terminal_every_report_is_a_plain_line(caplog):
    stream = io.StringIO()
    with caplog.at_level(logging.INFO, logger="megatron_ove"):
        display = ProgressDisplay(num_steps=10, start_step=0, console=Console(file=stream, force_terminal=False))
        display.step_done(3)
        display.report(ROW)
        display.close()
    assert stream.getvalue() == ""
    assert [record.getMessage() for record in caplog.records] == ["step 3/10  " + describe_row(ROW)]


def test_on_a_terminal_there_is_a_live_line(caplog):
    stream = io.StringIO()
    with caplog.at_level(logging.INFO, logger="megatron_ove"):
        display = ProgressDisplay(
            num_steps=10, start_step=2, console=Console(file=stream, force_terminal=True, width=200)
        )
        display.step_done(3)
        display.report(ROW)
        display.close()
    assert "3/10" in stream.getvalue() and "images 7.500" in stream.getvalue() and "data wait 7 %" in stream.getvalue()
    assert not caplog.records


def test_metrics_are_cut_at_the_resumed_step_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 3}) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    metrics = JsonLinesLogger(path, resume_step=4)
    metrics.log({"step": 5, "loss": 0.1})
    metrics.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 4 / 3), (5, 0.1)]


def test_an_intact_file_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    truncate_metrics(path, 1)
    assert path.stat().st_ino == before
    truncate_metrics(path, 0)
    assert path.read_text() == ""


def test_tensorboard_gets_every_figure_under_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(tmp_path, resume_step=0)
    board.log(ROW)
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(ROW) - {"step", "time"}
    (event,) = events.Scalars("loss/images")
    assert (event.step, event.value) == (3, 7.5)


def test_loggers_follow_the_configuration(tmp_path):
    opened = build_loggers(config(tmp_path / "a", tensorboard=False), resume_step=0)
    assert [type(item).__name__ for item in opened] == ["JsonLinesLogger"]
    opened += build_loggers(config(tmp_path / "b", tensorboard=True), resume_step=0)
    assert [type(item).__name__ for item in opened[1:]] == ["JsonLinesLogger", "TensorBoardLogger"]
    for item in opened:
        item.close()


def test_a_tracker_that_is_not_installed_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"tracking.wandb_project = mine needs the package wandb, which is not inst"):
        build_loggers(config(tmp_path, wandb_project="mine"), resume_step=0)


def test_a_tracker_knows_a_run_by_an_id_of_its_own(tmp_path):
    """Not by its path, which is the same in every container."""
    first, second = (loggers._wandb_id(tmp_path / name) for name in ("a", "b"))
    assert first != second and len(first) == 16
    assert loggers._wandb_id(tmp_path / "a") == first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_ask_for_a_stop_and_handlers_are_put_back(tmp_path, number):
    before = signal.getsignal(number)
    with StopSignal(tmp_path, watch_file=False) as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == f"{number.name} was received"
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_immediate(tmp_path):
    with StopSignal(tmp_path, watch_file=False), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_file_asks_until_the_next_start(tmp_path):
    (tmp_path / "stop").touch()
    with StopSignal(tmp_path, watch_file=False) as stop:
        assert not stop.requested
    with StopSignal(tmp_path, watch_file=True) as stop:
        assert stop.requested and stop.requested
        assert stop.reason == f"the file {tmp_path / 'stop'} was found"
    assert (tmp_path / "stop").exists()
    clear_stop_file(tmp_path)
    with StopSignal(tmp_path, watch_file=True) as stop:
        assert not stop.requested


def test_counters_survive_a_round_trip():
    state = TrainState()
    state.accept(8)
    state.refuse()
    state.refuse()
    again = TrainState()
    again.load_state_dict(state.state_dict())
    assert again == TrainState(step=3, samples_seen=8, refused_steps=2, refused_in_a_row=2)
    again.accept(8)
    assert again == TrainState(step=4, samples_seen=16, refused_steps=2, refused_in_a_row=0)


def test_the_sampler_fingerprint_follows_what_decides_the_data_order(tmp_path):
    base = config(tmp_path)
    sizes = {"a": 10}
    state = sampler_state(base, 7, sizes)
    assert (state["seed"], state["step"]) == (0, 7)
    assert sampler_state(base.model_copy(update={"seed": 1}), 7, sizes)["fingerprint"] != state["fingerprint"]
    assert sampler_state(base.model_copy(update={"name": "other"}), 8, sizes)["fingerprint"] == state["fingerprint"]
    assert sampler_state(base, 7, {"a": 11})["fingerprint"] != state["fingerprint"]
