"""How one setting is declared: its default, its meaning, and the values it allows."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

Value = bool | int | float | str


def option(
    default: Value,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """Declare one setting: its default, its meaning, and the values it allows (`low <= x <= high`, `x > above`)."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high, "above": above})
