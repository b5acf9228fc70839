"""From Flower's flat run config to the tree and back; every problem is reported at once."""

from __future__ import annotations

import difflib
import functools
import math
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from fbl_flower.config.class_names import expand_class_file, read_class_names
from fbl_flower.config.options import LARGEST_INT, Limits, Value, limits_of, shortened, shown_key
from fbl_flower.config.tree import RunConfig, conflicts
from fbl_flower.errors import ConfigError

_MOST_GUESSES = 20  # unknown keys for which the nearest known one is looked up, which takes a while
_LONGEST_GUESS = 100  # characters of such a key


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the configuration surface."""

    key: str
    default: Value
    help: str
    allowed: str
    limits: Limits


def surface() -> list[Setting]:
    """List every run-config key with its default, in the order of the tree."""
    return [
        Setting(key=key, default=f.default, help=f.metadata["help"], allowed=_allowed(kind, limits), limits=limits)
        for key, (f, kind) in _leaves(RunConfig).items()
        for limits in [limits_of(f.metadata)]
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
            guess = len(key) <= _LONGEST_GUESS and len(problems) < _MOST_GUESSES
            near = difflib.get_close_matches(key, leaves, n=1) if guess else []
            problems.append(f"{shown_key(key)}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        f, kind = leaves[key]
        try:
            limits = limits_of(f.metadata)
            values[key] = _checked_classes(key, _checked(key, value, kind, limits), limits.longest)
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


def _checked(key: str, value: Any, kind: type, limits: Limits) -> Value:
    right_type = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    if kind is int and right_type and not -LARGEST_INT - 1 <= value <= LARGEST_INT:
        raise ValueError(f"{key}: got {shortened(value)}; Flower carries whole numbers of 64 bits, up to {LARGEST_INT}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value, right_type = float(value) if abs(value) < 2**1000 else math.inf, True
    in_range = right_type and (kind in (bool, str) or (limits.low <= value <= limits.high and value > limits.above))
    if right_type and kind is float and not math.isfinite(value):
        in_range = False
    if limits.choices and value not in limits.choices:
        in_range = False
    note = f"({type(value).__name__})"
    if right_type and kind is str and not limits.choices:
        note = _text_problem(value, limits)
        in_range = not note
    if not (right_type and in_range):
        raise ValueError(f"{key}: got {shortened(value)} {note}; allowed: {_allowed(kind, limits)}")
    return value


def _text_problem(text: str, limits: Limits) -> str:
    """Say what is wrong with a text, in brackets; nothing if it is fine.

    Control characters forge lines of a log and end a path early; lone surrogates have no bytes, so that no file and no message takes them.
    """
    if not text and not limits.empty:
        return "(empty)"
    if len(text) > limits.longest:
        return "(too long)"
    odd = next((i for i, letter in enumerate(text) if unicodedata.category(letter) in ("Cc", "Cs")), None)
    return "" if odd is None else f"(the character {text[odd]!r} at index {odd} cannot be printed)"


def _checked_classes(key: str, value: Value, longest: int) -> Value:
    """Return class names that can be read on any machine: a file is read once, here, and travels as its list."""
    if key != "data.classes" or not isinstance(value, str):
        return value
    try:
        expanded = expand_class_file(value)
        read_class_names(expanded)
        if len(expanded) > longest:
            raise ValueError(f"{shortened(value)}, a list of {len(expanded)} characters, more than {longest}")
    except ValueError as error:
        raise ValueError(
            f'{key}: got {error}; allowed: names between commas, a JSON list (["a, b", "c"]), or @FILE, UTF-8 with a name per line'
        ) from error
    return expanded


def _allowed(kind: type, limits: Limits) -> str:
    if limits.choices:
        return " | ".join(limits.choices)
    if kind is bool:
        return "true | false"
    if kind is str:
        return f"text of {'at most' if limits.empty else '1 to'} {limits.longest} characters"
    noun, form = ("whole number", "d") if kind is int else ("number", "g")
    bounds = [f"> {limits.above:{form}}"] if limits.above > -math.inf else []
    bounds += [f">= {limits.low:{form}}"] if limits.low > -math.inf else []
    bounds += [f"<= {limits.high:{form}}"] if limits.high < math.inf else []
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
