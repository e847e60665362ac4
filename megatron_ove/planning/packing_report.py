"""How full the microbatches of a run will be: measured on the plans of its first steps, before anything is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ove.config.train import TrainConfig
from megatron_ove.data.planner import MicrobatchPlan, PlannedBudget, PlannedSource, budgets_of, planner_of

_BUDGET_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
_BUDGET_MULTIPLE = 128


@dataclass(frozen=True)
class PackingFigures:
    """One token budget at one number of replicas.

    Attributes:
        replicas: data-parallel size.
        budget: data.tokens_per_microbatch.
        microbatches: of a replica and step, mean.
        length: patches of a microbatch, mean over steps.
        padding: share of padding, mean over steps.
        worst_padding: the same, of the step that has most.
        fullness: name of a budget -> how full the microbatches are of it on average; patches first, whose limit is the
            token budget.
        attention_imbalance: what replicas wait for one another in attention, as a share of its time, if they compute
            their i-th microbatches together; mean over steps. Attention grows with the square of a sample's length.
    """

    replicas: int
    budget: int
    microbatches: float
    length: float
    padding: float
    worst_padding: float
    fullness: Mapping[str, float]
    attention_imbalance: float


def measure_packing(
    config: TrainConfig, sources: Sequence[PlannedSource], *, budget: int, replicas: int, num_steps: int
) -> PackingFigures:
    """Plans the first steps of a run.

    Args:
        config: the run; its own token budget is not used.
        sources: in the order of the configuration.
        budget: data.tokens_per_microbatch.
        replicas: data-parallel size.
        num_steps: steps.

    Raises:
        ConfigError: a sample has more patches than the budget, or a step is too small for its sources.
    """
    data = config.data.model_copy(update={"tokens_per_microbatch": budget})
    planner = planner_of(config.model_copy(update={"data": data}), sources, data_size=replicas)
    plans = [planner.plan(step) for step in range(num_steps)]
    imbalances = []
    for plan in plans:
        squares = np.bincount(plan.microbatch_index, plan.num_tokens.astype(float) ** 2, plan.num_microbatches)
        imbalances.append(squares.reshape(-1, replicas).max(axis=1).sum() * replicas / squares.sum() - 1)
    padding = [plan.padding_share for plan in plans]
    fullness = {
        "data.tokens_per_microbatch": float(np.mean([_fullness(plan, plan.num_tokens, budget) for plan in plans]))
    }
    for other in budgets_of(config):
        shares = [_fullness(plan, _sizes(plan, other, sources), other.capacity) for plan in plans]
        fullness[other.name] = float(np.mean(shares))
    return PackingFigures(
        replicas=replicas,
        budget=budget,
        microbatches=float(np.mean([plan.num_microbatches for plan in plans])) / replicas,
        length=float(np.mean([plan.tokens_per_microbatch for plan in plans])),
        padding=float(np.mean(padding)),
        worst_padding=max(padding),
        fullness=fullness,
        attention_imbalance=float(np.mean(imbalances)),
    )


def _fullness(plan: MicrobatchPlan, sizes: np.ndarray, capacity: int) -> float:
    """Returns how much of a budget the microbatches of a step have filled."""
    return float(sizes.sum()) / (plan.num_microbatches * capacity)


def _sizes(plan: MicrobatchPlan, budget: PlannedBudget, sources: Sequence[PlannedSource]) -> np.ndarray:
    """Returns what each sample of a step takes of a budget, [B] int64."""
    sizes = np.zeros(len(plan.rows), dtype=np.int64)
    for index, source in enumerate(sources):
        mine = plan.source_index == index
        sizes[mine] = budget.sizes(source, plan.rows[mine], plan.seeds[mine])
    return sizes


def largest_sample(config: TrainConfig, sources: Sequence[PlannedSource], *, num_steps: int) -> int:
    """Returns the patches of the largest sample of the first steps.

    Raises:
        ConfigError: it has more patches than the token budget, or a step is too small for its sources.
    """
    planner = planner_of(config, sources, data_size=1)
    return max(int(planner.plan(step).num_tokens.max()) for step in range(num_steps))


def nearby_budgets(budget: int, *, largest: int, multiple: int) -> list[int]:
    """Returns budgets around `budget`, ascending, it included: none below the largest sample.

    Args:
        budget: data.tokens_per_microbatch.
        largest: patches of the largest sample.
        multiple: what a budget must be a multiple of.
    """
    step = np.lcm(multiple, _BUDGET_MULTIPLE)
    others = {int(-(-budget * factor // step) * step) for factor in _BUDGET_FACTORS if factor != 1}
    return sorted({budget, *(one for one in others if one >= largest)})
