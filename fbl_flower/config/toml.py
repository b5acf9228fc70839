"""Settings as TOML, nested or flat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fbl_flower.config.options import Value


def flat_table(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted keys, as Flower does."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flat_table(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def to_toml(values: Mapping[str, Value]) -> str:
    """Write flat settings as TOML, one `key = value` a line; Flower reads it with `flwr run -c FILE`."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in values.items())


def _toml_value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for this one
    return repr(value)
