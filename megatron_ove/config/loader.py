"""From a YAML file to a checked `TrainConfig`: `extends`, `--set`, one report of all errors.

Precedence, later wins: defaults < files named by `extends`, in order < the file < `--set path=value`.
Mappings merge key by key, everything else replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_ove.config.error_report import describe_errors
from megatron_ove.config.train import TrainConfig
from megatron_ove.config.yaml_file import parse_yaml, read_yaml_mapping
from megatron_ove.errors import ConfigError
from megatron_ove.kinds import load_kinds


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Loads, merges and checks a training configuration.

    Args:
        path: YAML file.
        overrides: strings "a.b=value"; the value is read as YAML.

    Raises:
        ConfigError: with every mistake found, one sentence a line.
    """
    data = _read_with_bases(Path(path), ())
    for override in overrides:
        _apply_override(data, override)
    return config_from_dict(data, str(path))


def config_from_dict(data: dict[str, Any], name: str) -> TrainConfig:
    """Checks an already merged configuration; `name` is what the report calls it.

    Raises:
        ConfigError: with every mistake found, one sentence a line.
    """
    model = load_kinds(_plugins_in(data)).train_config
    try:
        return model.model_validate(_lists_to_tuples(data))
    except ValidationError as error:
        lines = describe_errors(error, data, model)
        count = f"{len(lines)} error{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"{name} has {count}:\n" + "\n".join(f"  - {line}" for line in lines)) from error


def _plugins_in(data: dict[str, Any]) -> tuple[str, ...]:
    """Returns the plugins that a configuration names; of anything but a list of texts none, and the check says so."""
    plugins = data.get("plugins") or ()
    is_list = isinstance(plugins, list | tuple) and all(isinstance(name, str) for name in plugins)
    return tuple(plugins) if is_list else ()


def dump_config(config: TrainConfig) -> str:
    """Returns the resolved configuration as YAML; loading it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_with_bases(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in parents:
        chain = " -> ".join(str(p) for p in (*parents, path))
        raise ConfigError(f"'extends' goes in a circle ({chain}), so no file comes first; remove one of the links")
    data = read_yaml_mapping(path)
    bases = data.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"{path}: extends = {bases!r} is not a list of file names; write extends: [../_base/file.yaml]"
        )
    merged: dict[str, Any] = {}
    for base in bases:
        _merge(merged, _read_with_bases(path.parent / base, (*parents, path)))
    _merge(merged, data)
    return merged


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override!r} is not of the form path=value; write for example --set optim.lr=1e-3")
    node = data
    for depth, key in enumerate(keys[:-1]):
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"--set {override!r}: '{'.'.join(keys[: depth + 1])}' is the value {child!r}, not a section, so "
                "nothing can be set inside it; check the path"
            )
        node = child
    node[keys[-1]] = parse_yaml(text, f"--set {path}")


def _lists_to_tuples(value: Any) -> Any:
    """YAML has no tuples; fields of fixed length are tuples and pydantic's strict mode wants them as such."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value
