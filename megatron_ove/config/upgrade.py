"""Configurations that earlier versions of this program stored, brought to the present form.

A configuration is stored with a checkpoint, with its version. Comparing, resuming and exporting see upgraded ones only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

CONFIG_VERSION = 2
"""Version of the configurations that this program stores. It grows when a stored one must be read in another way."""


def upgrade_config(stored: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Returns a stored configuration, whole or a part of one, as this version would have stored it.

    Args:
        stored: plain values; left as they are.
        version: that they were stored with; 1 for those without one.
    """
    data = copy.deepcopy(dict(stored))
    if version < 2 and isinstance(data.get("encoder"), dict):  # encoders have had kinds, and dropped paths, since then
        data["encoder"] = {"kind": "onevision", "drop_path": 0.0, **data["encoder"]}
    sources = data.get("data", {}).get("sources", {})
    for name, source in sources.items():  # without it they came in the order that is now the default
        sources[name] = {"order": None, **source}
    data["config_version"] = CONFIG_VERSION
    return data


def version_of(stored: Mapping[str, Any]) -> int:
    """Returns the version of a stored configuration."""
    return int(stored.get("config_version", 1))
