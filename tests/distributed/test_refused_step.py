"""Agreement of ranks about a step: one rank's NaN refuses it for all, one rank's stop request stops all."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.tiny_run import check, tiny_config, write_tiny_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def build(data: dict[str, Any]):
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    config = check(data)
    return Trainer(config, initialize_topology(config.parallel, seed=config.seed))


def everything(trainer: Any) -> dict[str, torch.Tensor]:
    """Returns copies of all weights, moments and tables of this rank."""
    from megatron_ove.training.build_model import model_of

    state = {f"model.{name}": value for name, value in model_of(trainer.chunks[0]).encoder.state_dict().items()}
    inner = trainer.optimizer._optimizer.optimizer
    for number, values in inner.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    for name in trainer.objectives:
        centers = trainer.objectives[name].centers
        for part in ("weight", "exp_avg", "exp_avg_sq", "steps"):
            state[f"{name}.{part}"] = getattr(centers, part)
    return {name: value.clone() for name, value in state.items() if torch.is_tensor(value)}


def train_with_one_bad_step(rank: int, world_size: int, data: dict[str, Any], where: str) -> dict[str, Any]:
    """Step 3 of 4 is spoilt on rank 1 only. Returns what changed in each step, and the messages."""
    trainer = build(data)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("megatron_ove.training").addHandler(handler)
    changed, forward, gradient_norms = [], trainer.objectives.forward, trainer.optimizer.gradient_norms

    def spoilt_forward(features, batch, scales):
        output = forward(features, batch, scales)
        if trainer.state.step == 2 and rank == 1:
            loss, count = output.metrics["ocr_labels/loss"]
            return replace(output, loss=output.loss * float("nan"), metrics={"ocr_labels/loss": (loss / 0, count)})
        return output

    def poisoned_forward(features, batch, scales):
        if trainer.state.step == 2 and rank == 1:
            pooled = features.pooled.clone()
            pooled[0, 5] = float(where.removeprefix("embedding "))
            features = replace(features, pooled=pooled)
        return forward(features, batch, scales)

    def spoilt_norms():
        norms = gradient_norms()
        return {"": float("inf")} if trainer.state.step == 2 and rank == 1 else norms

    if where == "loss":
        trainer.objectives.forward = spoilt_forward
    elif where.startswith("embedding"):
        trainer.objectives.forward = poisoned_forward
    else:
        trainer.optimizer.gradient_norms = spoilt_norms
    one_step = trainer._one_step

    def watched(*args: Any) -> Any:
        before = everything(trainer)
        result = one_step(*args)
        after = everything(trainer)
        changed.append(sorted(name for name in after if name in before and not torch.equal(before[name], after[name])))
        return result

    trainer._one_step = watched
    state = trainer.run()
    return {"changed": changed, "messages": messages, "state": state.state_dict(), "names": sorted(everything(trainer))}


@pytest.mark.parametrize("where", ["loss", "gradient norm", "embedding nan", "embedding inf"])
def test_a_refused_step_changes_nothing_on_any_rank(sources, tmp_path, where):
    data = tiny_config(sources, tmp_path, train={"num_steps": 4}, sample_rate=0.9)
    results = run_distributed(train_with_one_bad_step, 2, data, where)
    for result in results:
        # exp_avg etc. exist from the first step on, so the steps after it can change all of them.
        assert result["changed"][2] == []
        for step in (1, 3):
            assert set(result["names"]) - set(result["changed"][step]) == set()
        counts = {"samples_seen": 24, "refused_steps": 1, "refused_in_a_row": 0, "bad_samples": 0}
        assert result["state"] == {"step": 4, **counts}
    refusals = [text for text in results[0]["messages"] if "was refused" in text]
    assert len(refusals) == 1 and refusals[0].startswith("Step 3 was refused and changed nothing: ")
    if where == "loss":
        assert "the loss of objective 'ocr_labels' is" in refusals[0]
        assert "in a microbatch with these samples of source 'ocr': ocr0000" in refusals[0]
    elif where.startswith("embedding"):
        found = re.findall(
            r"the loss of objective '(\w+)_labels' is nan in a microbatch with these samples of source '(\w+)': (\w+)",
            refusals[0],
        )
        assert found and all(name == source and key.startswith(source) for name, source, key in found)
    else:
        assert "the gradient norm of the encoder is inf" in refusals[0]
    assert not any("was refused" in text for text in results[1]["messages"])


def stop_on_one_rank(rank: int, world_size: int, data: dict[str, Any], asking_rank: int) -> int:
    trainer = build(data)
    load_step = trainer.loader.load_step

    def asking(step: int) -> Any:
        if rank == asking_rank and step == 2:
            signal.raise_signal(signal.SIGUSR1)
        return load_step(step)

    import signal

    trainer.loader.load_step = asking
    return trainer.run().step


def test_a_stop_request_on_one_rank_stops_all_at_the_same_step(sources, tmp_path):
    data = tiny_config(sources, tmp_path, train={"num_steps": 50}, parallel={"pipeline_model_parallel_size": 2})
    steps = run_distributed(stop_on_one_rank, 2, data, 1)
    assert steps[0] == steps[1] and steps[0] in (3, 4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step_{steps[0]:08d}"]


def train_with_refused_first_steps(
    rank: int, world_size: int, data: dict[str, Any], num_refused: int
) -> dict[str, int]:
    trainer = build(data)
    gradient_norms = trainer.optimizer.gradient_norms
    trainer.optimizer.gradient_norms = lambda: (
        gradient_norms() if trainer.state.step >= num_refused else {"": gradient_norms()[""] * float("inf")}
    )
    return trainer.run().state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_continues_from_a_checkpoint_before_its_first_accepted_step(sources, tmp_path, precision):
    """AdamW makes its moments in its first update, so such a checkpoint has none."""
    train = {"num_steps": 4, "precision": precision}
    data = tiny_config(sources, tmp_path, train={**train, "stop_after_steps": 2})
    (state,) = run_distributed(train_with_refused_first_steps, 1, data, 2)
    assert state == {"step": 2, "samples_seen": 0, "refused_steps": 2, "refused_in_a_row": 2, "bad_samples": 0}
    (state,) = run_distributed(train_with_refused_first_steps, 1, tiny_config(sources, tmp_path, train=train), 2)
    assert state == {"step": 4, "samples_seen": 16, "refused_steps": 2, "refused_in_a_row": 0, "bad_samples": 0}
