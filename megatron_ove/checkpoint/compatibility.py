"""Does a checkpoint fit the present configuration? Answered from the stored configuration, before a tensor is read.

Three kinds of difference: another architecture (an error), another storage format of the optimizer (an error), and
settings that are allowed to change but end the equality with an uninterrupted run (a warning).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ove.errors import CheckpointError
from megatron_ove.kinds import Kinds, kinds_of

# Paths whose value decides which samples a step sees or what is drawn for them.
_EXACTNESS_PATHS = (
    "seed",
    "train.global_batch_size",
    "data.tokens_per_microbatch",
    "data.text_tokens_per_microbatch",
    "data.sources",
    "encoder.drop_path",
)
# Kinds of objectives say which of their fields do the same; margins, scales and weights may be tuned in a run.
# Settings whose value decides how something is stored.
_STORAGE_PATHS = {
    "parallel.use_distributed_optimizer": "the optimizer's state is",
    "train.precision": "the optimizer's state is",
    "optim.class_centers.weight_dtype": "class centers are",
    "optim.class_centers.first_moment": "the class centers' moments are",
    "optim.class_centers.second_moment": "the class centers' moments are",
}
# Settings that decide which weights have moments, and in which groups, with what they are where nothing is said.
_GROUPING_PATHS: dict[str, Any] = {"freeze": [], "optim.parts": {}, "optim.layer_decay": 1.0}


def check_fits(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose weights or optimizer state cannot be loaded into the configured model.

    Args:
        path: the checkpoint, for the message.
        saved: the configuration stored in it, as plain values.
        current: the present configuration, as plain values.

    Raises:
        CheckpointError: naming every differing field with both values.
    """
    kinds = kinds_of(current)
    encoder_differences = list(architecture_differences(saved["encoder"], current["encoder"], kinds))
    differences = encoder_differences + list(_objective_differences(saved["objectives"], current["objectives"], kinds))
    if differences:
        advice = "set the fields as they are in the checkpoint, or use another run_dir to train a new model"
        if not encoder_differences:
            advice = f"set the fields as they are in the checkpoint; or, {_keep_the_encoder(path)}"
        raise CheckpointError(f"the checkpoint {path} holds another model: {'; '.join(differences)}; {advice}")
    for setting, what in _STORAGE_PATHS.items():
        before, now = _lookup(saved, setting), _lookup(current, setting)
        if before != now:
            raise CheckpointError(
                f"the checkpoint {path} was saved with {setting} = {before} and this run has {now}, but "
                f"{what} stored differently for the two; set {setting}: {str(before).lower()}; or, "
                f"{_keep_the_encoder(path)}"
            )

    for setting, default in _GROUPING_PATHS.items():
        before, now = (_lookup(config, setting) for config in (saved, current))
        if _unordered(before or default) != _unordered(now or default):
            raise CheckpointError(
                f"the checkpoint {path} was saved with {setting} = {before or default} and this run has "
                f"{now or default}, but the optimizer's state is stored by groups of weights that move alike; set it "
                f"as it was; or, to go on in another way, write another run_dir and 'init_from: {path}', as a list of "
                "{path, parts} where more than the encoder is wanted"
            )


def _keep_the_encoder(path: Path) -> str:
    """Says what to write for a new run that starts with the encoder of a checkpoint that cannot be continued."""
    return (
        "to go on with its encoder and fresh class centers in a new run, write another run_dir and the line "
        f"'init_from: {path}'"
    )


def architecture_differences(saved: Mapping[str, Any], current: Mapping[str, Any], kinds: Kinds) -> Iterator[str]:
    """Yields a clause for every field of two encoder configurations that gives the weights other shapes or meaning.

    Args:
        saved, current: sections, plain values.
        kinds: of the run.
    """
    if saved["kind"] != current["kind"]:
        yield f"encoder.kind is {saved['kind']} there and {current['kind']} here"
        return
    for field in kinds.encoders[current["kind"]].identity:
        if saved.get(field) != current.get(field):
            yield f"encoder.{field} is {saved.get(field)} there and {current.get(field)} here"


def _objective_differences(saved: Mapping[str, Any], current: Mapping[str, Any], kinds: Kinds) -> Iterator[str]:
    for name in sorted(saved.keys() | current.keys()):
        if name not in saved:
            yield f"objectives.{name} is not in the checkpoint"
        elif name not in current:
            yield f"objectives.{name} is in the checkpoint but not here"
        elif saved[name]["kind"] != current[name]["kind"]:
            yield f"objectives.{name}.kind is {saved[name]['kind']} there and {current[name]['kind']} here"
        else:
            yield from kinds.objectives[current[name]["kind"]].differences(name, saved[name], current[name])


def exactness_warnings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns one sentence for every setting that makes the resumed run differ from an uninterrupted one."""
    warnings = []
    names = sorted(saved["objectives"].keys() & current["objectives"].keys())
    kinds = kinds_of(current)
    of_objectives = [
        f"objectives.{name}.{field}"
        for name in names
        for field in ("source", *kinds.objectives[current["objectives"][name]["kind"]].exact_fields)
    ]
    for path in (*_EXACTNESS_PATHS, *of_objectives):
        before, now = _lookup(saved, path), _lookup(current, path)
        if before is None:
            continue  # a setting that the version which saved it did not have
        if path.endswith(".source"):
            before, now = ([one] if isinstance(one, str) else one for one in (before, now))
        for field, old, new in _leaf_differences(path, before, now):
            warnings.append(
                f"{field} was {old} when the checkpoint was saved and is {new} now, so from here on the run sees other "
                "samples or draws than an uninterrupted one; set it back if you need the same result"
            )
    return warnings


def size_warnings(saved: Mapping[str, int], current: Mapping[str, int]) -> list[str]:
    """Returns one sentence for every source whose number of samples has changed, and with it its order.

    Args:
        saved: source -> samples when the checkpoint was saved; may be empty.
        current: source -> samples now.
    """
    return [
        f"data.sources.{name} had {saved[name]} samples when the checkpoint was saved and has {count} now, so from "
        "here on its samples come in another order, some of them again early; keep the set if you need the same result"
        for name, count in current.items()
        if saved.get(name, count) != count
    ]


def shifted_moments_clause(parameter: str) -> str:
    """Says what is wrong with a checkpoint in which master weights are not the weights, and why.

    Args:
        parameter: name of one that shows it.
    """
    return (
        f"the master weights of {parameter} are not its weights, because an earlier version of this program saved it "
        "and let megatron-core give parameters the moments and master weights of their neighbours "
        "(parallel.use_distributed_optimizer with several gradient buckets)"
    )


def _lookup(tree: Mapping[str, Any], path: str) -> Any:
    value: Any = tree
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple) else value


def _leaf_differences(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            yield from _leaf_differences(f"{path}.{key}", before.get(key, "absent"), now.get(key, "absent"))
    elif before != now:
        yield path, before, now
