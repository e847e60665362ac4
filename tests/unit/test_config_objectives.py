"""Objectives: margins and sets of classes, and the sentences about them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.errors import ConfigError
from tests.unit.test_config import changed


@pytest.mark.parametrize(
    "margins", [[0.0, 0.3, 0.2], [2.1, 0.3, 0.2], [1.0, 1.5, 0.2], [1.0, -0.1, 0.2], [1.0, 0.3, 1.0]]
)
def test_a_combined_margin_out_of_range_gets_its_sentence(margins: list[float]) -> None:
    data = changed("objectives.clusters.margin_type", "combined")
    data["objectives"]["clusters"]["combined_margin"] = margins
    with pytest.raises(ConfigError) as caught:
        config_from_dict(data, "run.yaml")
    assert f"combined_margin = {margins} is outside its ranges: m1, a factor of the angle, in (0, 2]" in str(
        caught.value
    )
    assert str(caught.value).endswith("use for instance [1.0, 0.3, 0.2]")


def test_more_class_sets_than_labels_get_their_sentence() -> None:
    data = changed("objectives.clusters.negatives", "grouped")
    data["objectives"]["clusters"]["negative_groups"] = 9
    with pytest.raises(ConfigError, match="negative_groups = 9 is more than labels_per_step = 8, so some class sets"):
        config_from_dict(data, "run.yaml")


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [1] * 8),
        ({"negatives": "shared"}, [8]),
        ({"negatives": "grouped", "negative_groups": 3}, [2, 3, 3]),
        ({"negatives": "grouped", "negative_groups": 8}, [1] * 8),
        ({"negatives": "grouped", "negative_groups": 1}, [8]),
        ({"labels_per_step": 5, "negatives": "grouped", "negative_groups": 2}, [2, 3]),
    ],
)
def test_class_sets_serve_every_label_slot_once(options: dict[str, Any], sizes: list[int]) -> None:
    config = PartialFCConfig(source="images", num_classes=100, **options)
    assert [len(slots) for slots in config.slots_of_sets] == sizes
    assert [slot for slots in config.slots_of_sets for slot in slots] == list(range(config.labels_per_step))


def test_a_number_of_negatives_takes_the_place_of_their_share() -> None:
    assert PartialFCConfig(source="images", num_classes=10, sample_rate=0.3).inclusion_probability == 0.3
    config = PartialFCConfig(source="images", num_classes=10, sample_rate=0.3, num_sampled=7)
    assert config.inclusion_probability == 0.7
