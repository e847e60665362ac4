"""Objectives: margins and sets of classes, and the sentences about them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import pytest
from pydantic import Field

from megatron_ove.config.base import StrictModel
from megatron_ove.config.loader import config_from_dict, load_config
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.config.text_generation import TextGenerationConfig
from megatron_ove.errors import ConfigError
from megatron_ove.kinds import load_kinds
from megatron_ove.objectives.build import build_objectives
from tests.unit.test_config import changed

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_section_without_its_kind_gets_a_sentence_that_says_what_to_write() -> None:
    data = changed("objectives.clusters.margin", 0.1)
    del data["objectives"]["clusters"]["kind"]
    del data["data"]["sources"]["images"]["kind"]
    with pytest.raises(ConfigError) as caught:
        config_from_dict(data, "run.yaml")
    assert str(caught.value).splitlines()[1:] == [
        "  - missing key 'objectives.clusters.kind': it says which kind of section this is; add 'kind: partial_fc' or "
        "'kind: text_generation' or 'kind: feature_reconstruction' "
        "or 'kind: token_alignment' or 'kind: pixel_reconstruction'",
        "  - missing key 'data.sources.images.kind': it says which kind of section this is; add 'kind: image' or "
        "'kind: ocr' or 'kind: document' or 'kind: video'",
    ]


def test_an_unknown_kind_gets_its_sentence() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(changed("objectives.clusters.kind", "text"), "run.yaml")
    assert "objectives.clusters.kind = 'text' is not one of the known values; use partial_fc" in str(caught.value)


class TextConfig(StrictModel):
    """A kind that nobody has described."""

    kind: Literal["text"]
    source: str
    loss_weight: float = 1.0


def test_an_objective_that_cannot_be_built_is_not_left_out() -> None:
    configs: Any = {"text": TextConfig(kind="text", source="images")}
    common = {"topology": cast(Any, None), "embedding_size": 8, "seed": 0, "optim": ClassCenterOptimConfig()}
    with pytest.raises(KeyError, match="text"):
        build_objectives(configs, kinds=load_kinds(), **common)


@pytest.mark.parametrize("recipe", sorted(EXAMPLES.glob("*/config*.yaml")), ids=lambda path: f"{path.parent.name}")
def test_recipes_stay_readable_when_there_are_several_kinds(recipe: Path) -> None:
    """Of a union of two or more kinds pydantic wants the tag itself; a default does not count."""

    class Union(StrictModel):
        objectives: dict[str, Annotated[PartialFCConfig | TextGenerationConfig, Field(discriminator="kind")]]

    objectives = load_config(recipe).model_dump(exclude_unset=True)["objectives"]
    assert Union.model_validate({"objectives": objectives}).objectives == load_config(recipe).objectives


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
    config = PartialFCConfig(kind="partial_fc", source="images", num_classes=100, **options)
    assert [len(slots) for slots in config.slots_of_sets] == sizes
    assert [slot for slots in config.slots_of_sets for slot in slots] == list(range(config.labels_per_step))


def test_a_number_of_negatives_takes_the_place_of_their_share() -> None:
    assert (
        PartialFCConfig(kind="partial_fc", source="images", num_classes=10, sample_rate=0.3).inclusion_probability
        == 0.3
    )
    config = PartialFCConfig(kind="partial_fc", source="images", num_classes=10, sample_rate=0.3, num_sampled=7)
    assert config.inclusion_probability == 0.7
