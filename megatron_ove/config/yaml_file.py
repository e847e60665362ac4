"""YAML as people mean it: `1e-3` is a number, a key given twice is an error, every error names file and line.

PyYAML follows YAML 1.1, where `1e-3` (no dot) is a string, and silently keeps the last of two equal keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megatron_ove.errors import ConfigError

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 floats and refused duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise ConfigError(
                    f"{node.start_mark.name}, line {line}: the key {key!r} is a list or a section, but a key is a "
                    "name; give it one"
                )
            if key in seen:
                raise ConfigError(
                    f"{node.start_mark.name}: key '{key}' is given twice, on lines {seen[key]} and {line}, and only "
                    "one of them could count; remove one"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, name: str) -> Any:
    """Parses one YAML document; `name` is what messages call it.

    Raises:
        ConfigError: bad syntax or a duplicate key, with the line.
    """
    try:
        return _load(text, name)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(
            f"{name}, line {line}: this is not valid YAML ({error.problem}); check indentation, colons and quotes there"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # control characters, a 13th month, a node in itself
        reason = str(error).split("\n")[0]
        raise ConfigError(f"{name}: this is not valid YAML ({reason}); correct the file or the path") from error


def _load(text: str, name: str) -> Any:
    loader = _Loader(text)
    try:
        loader.name = name
        data = loader.get_single_data()
    finally:
        loader.dispose()
    json.dumps(data, default=str, skipkeys=True)  # refuses an anchor that holds itself, which merging could not end
    return data


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML file that must hold a mapping.

    Raises:
        ConfigError: the file is missing, unreadable, invalid, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration {path}: {reason}; check the path") from error
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} holds a {type(data).__name__} at its top level, but a configuration is a mapping of keys to "
            "values; see examples/quickstart/config.yaml"
        )
    return data
