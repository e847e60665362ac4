"""The loss of a head that knows nothing: what a training loss has to get below before anything was learned."""

from __future__ import annotations

import math

import torch

from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.heads.active_classes import expect_active_rows
from megatron_ove.heads.margin_softmax import MarginSoftmax


def margin_softmax_of(config: PartialFCConfig) -> MarginSoftmax:
    """Returns the rule that turns an objective's cosines into its loss."""
    return MarginSoftmax(
        margin_type=config.margin_type,
        margin=config.margin,
        logit_scale=config.logit_scale,
        interclass_filter=config.interclass_filter,
        interclass_filter_mode=config.interclass_filter_mode,
        co_positives=config.co_positives,
        combined_margin=config.combined_margin or (1.0, 0.0, 0.0),
    )


def chance_loss(config: PartialFCConfig, num_samples: float) -> float:
    """Returns the loss of one label when all cosines are 0: log(1 + n e^-t).

    t is the label's logit after the margin (-s m for cosface), n the negatives of a class set as they count: those
    drawn and the other labels of the step, which are taken to be all different, or with `logq` all classes. Labels that
    repeat, frequent classes and masked co-positives make n and the loss smaller, so this is rather too high. Centers
    that are equally far from an embedding that is always the same reach it.

    Args:
        config: of the objective, its `num_classes` known.
        num_samples: of its source in a step, over all replicas.
    """
    classes = config.table_size
    active = float(classes)
    if config.sampling_correction == "none":
        most_slots = max(len(slots) for slots in config.slots_of_sets)
        labels = math.ceil(num_samples * config.items_per_sample * most_slots)
        probability = config.inclusion_probability
        active = expect_active_rows(classes, classes, probability=probability, num_sets=1, num_labels=labels)
    target = float(margin_softmax_of(config).target_logits(torch.zeros((), dtype=torch.float64)))
    negatives = max(active - 1, 1e-9)
    return float(torch.nn.functional.softplus(torch.tensor(math.log(negatives) - target, dtype=torch.float64)))
