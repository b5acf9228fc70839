"""From Flower's flat run config to the tree and back; every problem is reported at once."""

from __future__ import annotations

import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from fbl_flower.config.class_names import expand_class_file, read_class_names
from fbl_flower.config.options import Value
from fbl_flower.config.tree import RunConfig, conflicts
from fbl_flower.errors import ConfigError

_MOST = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the configuration surface."""

    key: str
    default: Value
    help: str
    allowed: str


def surface() -> list[Setting]:
    """List every run-config key with its default, in the order of the tree."""
    return [
        Setting(key=key, default=f.default, help=f.metadata["help"], allowed=_allowed(kind, f.metadata))
        for key, (f, kind) in _leaves(RunConfig).items()
    ]


def parse_config(run_config: Mapping[str, Value], *, found: Sequence[str] = ()) -> RunConfig:
    """Turn Flower's flat run config into a validated `RunConfig`; keys left out take their defaults.

    Args:
        run_config: Settings by key.
        found: Problems that a caller found already, to be reported first and together with these.

    Raises:
        ConfigError: Lists every unknown key, wrong type and value out of range at once.
    """
    leaves = _leaves(RunConfig)
    problems = list(found)
    values: dict[str, Value] = {}
    for key, value in run_config.items():
        if key not in leaves:
            near = difflib.get_close_matches(key, leaves, n=1)
            problems.append(f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        f, kind = leaves[key]
        try:
            values[key] = _checked_classes(key, _checked(key, value, kind, f.metadata))
        except ValueError as problem:
            problems.append(str(problem))
    config = _build(RunConfig, values)
    refused = run_config.keys() - values.keys()
    problems += [text for keys, text in conflicts(config) if not refused & set(keys)]
    if problems:
        raise ConfigError(problems)
    return config


def flatten(config: RunConfig) -> dict[str, Value]:
    """Turn a `RunConfig` back into flat run-config keys; `parse_config(flatten(c)) == c`."""
    flat: dict[str, Value] = {}

    def walk(node: Any, prefix: str) -> None:
        for f in fields(node):
            value, key = getattr(node, f.name), prefix + f.name.replace("_", "-")
            if is_dataclass(value):
                walk(value, key + ".")
            else:
                flat[key] = value

    walk(config, "")
    return flat


@functools.cache
def _leaves(cls: type, prefix: str = "") -> dict[str, tuple[Any, type]]:
    """Map every flat key to its dataclass field and type."""
    hints = typing.get_type_hints(cls)
    out: dict[str, tuple[Any, type]] = {}
    for f in fields(cls):
        key, kind = prefix + f.name.replace("_", "-"), hints[f.name]
        if isinstance(kind, type) and is_dataclass(kind):
            out |= _leaves(kind, key + ".")
        else:
            out[key] = (f, kind)
    return out


def _checked(key: str, value: Any, kind: type, meta: types.MappingProxyType[Any, Any]) -> Value:
    right_type = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    if kind is int and right_type and not -_MOST - 1 <= value <= _MOST:
        raise ValueError(f"{key}: got {value}; Flower carries whole numbers of 64 bits, up to {_MOST}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value, right_type = float(value) if abs(value) < 2**1000 else math.inf, True
    in_range = right_type and (kind in (bool, str) or (meta["low"] <= value <= meta["high"] and value > meta["above"]))
    if right_type and kind is float and not math.isfinite(value):
        in_range = False
    if meta["choices"] and value not in meta["choices"]:
        in_range = False
    if not (right_type and in_range):
        raise ValueError(f"{key}: got {value!r} ({type(value).__name__}); allowed: {_allowed(kind, meta)}")
    return value


def _checked_classes(key: str, value: Value) -> Value:
    """Return class names that can be read on any machine: a file is read once, here, and travels as its list."""
    if key != "data.classes" or not isinstance(value, str):
        return value
    try:
        expanded = expand_class_file(value)
        read_class_names(expanded)
    except ValueError as error:
        raise ValueError(
            f'{key}: got {error}; allowed: names between commas, a JSON list (["a, b", "c"]), or @FILE, UTF-8 with a name per line'
        ) from error
    return expanded


def _allowed(kind: type, meta: types.MappingProxyType[Any, Any]) -> str:
    if meta["choices"]:
        return " | ".join(meta["choices"])
    if kind is bool:
        return "true | false"
    if kind is str:
        return "text"
    noun = "whole number" if kind is int else "number"
    bounds = [f"> {meta['above']:g}"] if meta["above"] > -math.inf else []
    bounds += [f">= {meta['low']:g}"] if meta["low"] > -math.inf else []
    bounds += [f"<= {meta['high']:g}"] if meta["high"] < math.inf else []
    return f"{noun} {' and '.join(bounds)}".strip()


def _build(cls: type, values: Mapping[str, Value], prefix: str = "") -> Any:
    arguments: dict[str, Any] = {}
    for f in fields(cls):
        key = prefix + f.name.replace("_", "-")
        if f.default is MISSING:  # a section: its default is made by its own class
            section: Any = f.default_factory
            arguments[f.name] = _build(section, values, key + ".")
        else:
            arguments[f.name] = values.get(key, f.default)
    return cls(**arguments)
