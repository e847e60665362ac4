"""Which parameters decay, and the one place where group hyperparameters are set.

megatron-core puts `wd_mult` and `lr_mult` into parameter groups and leaves it to the caller to multiply with them: an
optimizer that is only built and stepped decays *every* parameter. Its default rule (one-dimensional, or "*.bias") also
misses the pooling probe, which is [1, 1, h]. So the rule is ours, and `set_group_hyperparameters` runs before every
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from megatron_ove.config.optim import OptimConfig
from megatron_ove.optim.parts import multipliers_of


def has_weight_decay(name: str, param: Tensor) -> bool:
    """Returns whether a parameter decays: weight matrices do; norms, biases, learned queries and positions do not.

    Source: OneVision-Encoder decays everything; we follow the usual ViT recipe (Touvron et al. 2021, DeiT, 3).
    """
    return param.ndim > 1 and not name.endswith((".bias", "probe", ".queries", ".position_embeddings.weight"))


def config_overrides(
    names: Mapping[Tensor, str], config: OptimConfig, num_layers: int, before_layers: Sequence[str]
) -> dict[ParamKey, ParamGroupOverride]:
    """Returns rates and decay of parts in the form that megatron-core's `get_megatron_optimizer` takes.

    Args:
        names: parameter -> its name in the whole model.
        config: of the optimizer.
        num_layers: of the whole encoder.
        before_layers: parts of the encoder that come before its layers.
    """
    groups: dict[tuple[float, float], set[Tensor]] = {}
    for parameter, name in names.items():
        rate, decay = multipliers_of(name, config, num_layers, before_layers)
        groups.setdefault((rate, decay if has_weight_decay(name, parameter) else 0.0), set()).add(parameter)
    groups.pop((1.0, 1.0), None)
    overrides: dict[ParamKey, ParamGroupOverride] = {}
    for (rate, decay), members in groups.items():
        predicate = ParamWithNamePredicate(
            name=f"rate {rate:g}, decay {decay:g}", fn=lambda param, _, members=members: param in members
        )
        override = {} if rate == 1.0 else {"lr_mult": rate}
        override |= {} if decay == 1.0 else {"wd_mult": decay}
        overrides[ParamKey(with_name_predicate=predicate)] = override  # type: ignore[assignment]
    return overrides


def set_group_hyperparameters(groups: Iterable[dict[str, Any]], config: OptimConfig, *, lr: float) -> None:
    """Sets rate, decay, betas and epsilon of every group from the configuration.

    Setting all of them, each step, also means that a resumed run obeys its configuration and not the checkpoint's.

    Args:
        groups: parameter groups of a torch optimizer with megatron-core's `wd_mult` and `lr_mult`.
        config: of the optimizer.
        lr: rate of this step.
    """
    for group in groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        group["betas"] = (config.beta1, config.beta2)
        group["eps"] = config.epsilon
