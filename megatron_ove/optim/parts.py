"""Parts of a model by name: what `freeze`, `optim.parts` and `init_from` speak of.

Every weight has one name whatever the layout: `encoder.patch_embed.weight`, `encoder.layers.3.mlp.linear_fc1.weight`,
`objectives.read.decoder.weight`; a table of rows is `objectives.<objective>.class_centers`. A part is the beginning of
names up to a dot; a number in it may be a range, like `encoder.layers.0-5`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from megatron_ove.config.optim import OptimConfig, PartConfig

_RANGE = re.compile(r"(\d+)-(\d+)")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def is_in_part(name: str, part: str) -> bool:
    """Returns whether a weight belongs to a part."""
    names, wanted = name.split("."), part.split(".")
    return len(names) >= len(wanted) and all(map(_fits, names, wanted))


def is_in_any(name: str, parts: Iterable[str]) -> bool:
    """Returns whether a weight belongs to one of some parts."""
    return any(is_in_part(name, part) for part in parts)


def parts_without_weights(parts: Iterable[str], names: Iterable[str]) -> list[str]:
    """Returns the parts that no weight belongs to."""
    names = list(names)
    return [part for part in parts if not any(is_in_part(name, part) for name in names)]


def top_parts(names: Iterable[str]) -> list[str]:
    """Returns what a user may want to name, for messages: the first two members of each name, in order."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def multipliers_of(
    name: str, config: OptimConfig, num_layers: int, before_layers: Sequence[str]
) -> tuple[float, float]:
    """Returns (rate, weight decay) of a weight in multiples of the run's; the longest part that it belongs to counts.

    With `layer_decay` d, layer i of n moves at d ** (n - i) of the rate, patch embedding at d ** (n + 1), and what
    comes behind the layers at the whole. Source: BEiT (Bao et al., 2022), appendix, as timm counts layers.

    Args:
        name: of the weight.
        config: of the optimizer.
        num_layers: n, of the whole encoder.
        before_layers: parts of the encoder that come before its layers.
    """
    part = _longest(name, config.parts)
    rate = part.lr_multiplier * config.layer_decay ** _distance_from_the_end(name, num_layers, before_layers)
    return rate, part.weight_decay_multiplier


def _longest(name: str, parts: Mapping[str, PartConfig]) -> PartConfig:
    fitting = [part for part in parts if is_in_part(name, part)]
    return parts[max(fitting, key=lambda part: part.count("."))] if fitting else PartConfig()


def _distance_from_the_end(name: str, num_layers: int, before_layers: Sequence[str]) -> int:
    layer = _LAYER.match(name)
    if layer:
        return num_layers - int(layer[1])
    return num_layers + 1 if is_in_any(name, before_layers) else 0


def _fits(name: str, wanted: str) -> bool:
    span = _RANGE.fullmatch(wanted)
    if span and name.isdigit():
        return int(span[1]) <= int(name) <= int(span[2])
    return name == wanted


def missing_part_sentence(
    setting: str, parts: Sequence[str], names: Iterable[str], names_of_tables: Iterable[str] = ()
) -> str:
    """Says that parts in a setting have no weights.

    Args:
        setting: place in the configuration.
        parts: that no weight belongs to.
        names: of all weights that the setting may speak of.
        names_of_tables: of tables, which it may not speak of.
    """
    names_of_tables = list(names_of_tables)
    if tables := [part for part in parts if any(is_in_part(name, part) for name in names_of_tables)]:
        return (
            f"{setting} names '{tables[0]}', which has class centers only; their rate is "
            "optim.class_centers.lr_multiplier, so set that"
        )
    listed = " and ".join(f"'{part}'" for part in parts)
    return (
        f"{setting} names {listed}, but no weight of this model begins so; parts are for instance "
        f"{', '.join(top_parts(names))}, encoder.layers.0-5"
    )
