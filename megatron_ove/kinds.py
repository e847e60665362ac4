"""Kinds of encoder, objective and source: what each is, in one place, and how a run finds them.

A configuration section says its `kind`; everything that depends on the kind is in a description here: the class of the
section, how to build it, what it needs, what a checkpoint must share with it. `catalog.py` describes the kinds of this
package, one line each. Modules that a configuration names under `plugins` add theirs: each has any of the mappings
`ENCODERS`, `OBJECTIVES` and `SOURCES`, name -> description, as `catalog.py` has. They are imported on every rank, and
the list is stored with the run, so what a run is made of does not change with what happens to be installed.

Catalog and plugins are imported by name, and what stands above this page has no type here, because they stand above
everything that looks a kind up.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from megatron_ove.config.data import SourceConfig
from megatron_ove.config.encoder import EncoderSection
from megatron_ove.config.objectives import ObjectiveConfig
from megatron_ove.config.train import TrainConfig, train_config_of
from megatron_ove.errors import ConfigError

CATALOG = "megatron_ove.catalog"


def lazily(place: str) -> Callable[..., Any]:
    """Returns what calls "module:function" and imports the module only then: configurations are read without torch."""
    module, _, name = place.partition(":")

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **options)

    return call


@dataclass(frozen=True)
class EncoderKind:
    """A kind of encoder.

    Attributes:
        config: class of the section `encoder`.
        build: (section, topology, *, dtype, seed, has_gradient_buffers) -> the model chunks of this rank, each a
            `MegatronModule` as `model/encoder_chunk.py` describes it, initialised alike under every layout.
        footprint: () -> an `EncoderFootprint`, what planning asks.
        operations: (section, *, tokens, samples, squares) -> part -> operations of forward and backward, what MFU is
            measured by; see `model/operations.py`.
        identity: fields of the section that decide names, shapes or meaning of the weights.
        before_layers: parts of the encoder, as weights' names begin, that come before its layers; for `layer_decay`.
        exchange: () -> an `EncoderExchange` (`convert/exchange.py`), the published form of the weights; None = there is
            none, and exports hold the weights as they are stored.
    """

    config: type[EncoderSection]
    build: Callable[..., Any]
    footprint: Callable[[], Any]
    operations: Callable[..., dict[str, float]]
    identity: tuple[str, ...]
    before_layers: tuple[str, ...] = ()
    exchange: Callable[[], Any] | None = None


@dataclass(frozen=True)
class SourceKind:
    """A kind of source.

    Attributes:
        config: class of a section in `data.sources`.
        build: (name, section, *, shards, patch_size, device, num_threads) -> a `DataSource`.
        shard_kind: kind of the shard sets that it reads.
        find_mismatches: (run, name of the source, description of its shard set) -> a sentence for everything in which
            they do not fit.
        whole_samples: (path, image_size, max_patches) -> a section that shows the samples of a shard set with no
            chance in it, for evaluation; None = shard sets of this kind are evaluated as another kind says.
    """

    config: type[SourceConfig]
    build: Callable[..., Any]
    shard_kind: str
    find_mismatches: Callable[[TrainConfig, str, Any], list[str]] = lambda run, name, info: []
    whole_samples: Callable[[str, int, int], SourceConfig] | None = None


@dataclass(frozen=True)
class ObjectiveKind:
    """A kind of objective.

    Attributes:
        config: class of a section in `objectives`.
        build: (name, section, `ObjectiveContext`) -> an `Objective`.
        footprint: () -> an `ObjectiveFootprint`, what planning asks.
        budgets: (run, name) -> `PlannedBudget`s that microbatches keep besides `data.tokens_per_microbatch`.
        fill_in: (section, descriptions of its sources' shard sets) -> fields that these decide, if they are not given.
        find_mismatches: (run, name, source -> opened shard set) -> a sentence for everything that could not be learned.
        find_doubts: (run, name, source -> opened shard set, whether to look at all samples) -> a sentence for
            everything that may be meant otherwise.
        find_held_out_mismatches: (run, name, held-out shard set) -> a sentence for everything in which the set differs
            from what the objective trains on.
        differences: (name, stored section, present section) -> a clause for everything that stored weights cannot be
            used with.
        exact_fields: fields that decide which samples or draws a step sees.
        chance_loss: (section, samples of its sources in a step) -> loss of a head that knows nothing; None = unknown.
        describe: stored section -> what it learns, in a few words, for model cards.
    """

    config: type[ObjectiveConfig]
    build: Callable[..., Any]
    footprint: Callable[[], Any]
    budgets: Callable[[TrainConfig, str], Sequence[Any]] = lambda run, name: ()
    fill_in: Callable[[ObjectiveConfig, Sequence[Any]], Mapping[str, Any]] = lambda section, infos: {}
    find_mismatches: Callable[[TrainConfig, str, Mapping[str, Any]], list[str]] = lambda run, name, sets: []
    find_doubts: Callable[..., list[str]] = lambda run, name, sets, *, counts_samples: []
    find_held_out_mismatches: Callable[[TrainConfig, str, Any], list[str]] | None = None
    differences: Callable[[str, Mapping[str, Any], Mapping[str, Any]], Iterator[str]] = lambda name, there, here: iter(
        ()
    )
    exact_fields: tuple[str, ...] = ()
    chance_loss: Callable[[ObjectiveConfig, float], float] | None = None
    describe: Callable[[Mapping[str, Any]], str] = lambda section: section["kind"]


@dataclass(frozen=True)
class Kinds:
    """All kinds that a run may name.

    Attributes:
        plugins: modules that they come from, besides this package's own.
    """

    plugins: tuple[str, ...]
    encoders: Mapping[str, EncoderKind] = field(hash=False)
    objectives: Mapping[str, ObjectiveKind] = field(hash=False)
    sources: Mapping[str, SourceKind] = field(hash=False)

    @cached_property
    def train_config(self) -> type[TrainConfig]:
        """The configuration class that knows these kinds; `TrainConfig.kinds` of its objects is this object."""
        model = train_config_of(
            encoders={name: kind.config for name, kind in self.encoders.items()},
            objectives={name: kind.config for name, kind in self.objectives.items()},
            sources={name: kind.config for name, kind in self.sources.items()},
        )
        model.kinds = self
        return model

    def source_of_shards(self, shard_kind: str) -> SourceKind:
        """Returns the kind of source that shows shard sets of this kind to an evaluation."""
        return next(
            kind for kind in self.sources.values() if kind.shard_kind == shard_kind and kind.whole_samples is not None
        )


@cache
def load_kinds(plugins: tuple[str, ...] = ()) -> Kinds:
    """Returns this package's kinds and those of plugins.

    Raises:
        ConfigError: a plugin cannot be imported, describes nothing, or a kind that exists already.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in _DESCRIPTIONS}
    twice = [name for name in plugins if plugins.count(name) > 1 or name == CATALOG]
    if twice:
        raise ConfigError(f"plugins: {twice[0]} is there already; name each module once, and none of this package")
    for name in (CATALOG, *plugins):
        described = _described_by(name)
        for dictionary, kinds in described.items():
            for kind, description in kinds.items():
                if kind in found[dictionary]:
                    raise ConfigError(
                        f"plugins: {name} describes the kind '{kind}' in {dictionary}, which exists already; give it "
                        "another name"
                    )
                found[dictionary][kind] = description
        if not any(described.values()):
            raise ConfigError(
                f"plugins: {name} has none of ENCODERS, OBJECTIVES and SOURCES, so it adds nothing; name the module "
                "that describes the kinds"
            )
    return Kinds(tuple(plugins), found["ENCODERS"], found["OBJECTIVES"], found["SOURCES"])


def kinds_of(stored: Mapping[str, Any]) -> Kinds:
    """Returns the kinds of a stored configuration, plain values.

    Raises:
        ConfigError: a plugin that it was made with cannot be imported here.
    """
    return load_kinds(tuple(stored.get("plugins", ())))


def _described_by(name: str) -> dict[str, Mapping[str, Any]]:
    """Returns dictionary -> kind -> description, of a module.

    Raises:
        ConfigError: it cannot be imported, or what it describes is not of the form.
    """
    module, found = _import(name), {}
    for dictionary, form in _DESCRIPTIONS.items():
        found[dictionary] = kinds = getattr(module, dictionary, {})
        if not isinstance(kinds, Mapping) or not all(isinstance(one, form) for one in kinds.values()):
            raise ConfigError(
                f"plugins: {dictionary} of {name} is not a dictionary of names and {form.__name__}s; write it as "
                "CONTRIBUTING.md shows"
            )
    return found


def _import(name: str) -> Any:
    if name != CATALOG and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that nothing in it takes the place of an installed module
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"plugins: {name} cannot be imported ({error}); install it where this program runs, or start from the "
            "folder that holds it"
        ) from error
    except Exception as error:  # whatever a module does when it is imported
        raise ConfigError(
            f"plugins: {name!r} cannot be imported ({type(error).__name__}: {error}); correct the name or the module"
        ) from error


_DESCRIPTIONS: Mapping[str, type[Any]] = {
    "ENCODERS": EncoderKind,
    "OBJECTIVES": ObjectiveKind,
    "SOURCES": SourceKind,
}
