"""How one setting is declared: its default, its meaning, and the values it allows.

Every number has a lower and an upper bound, and every text a greatest length. The upper bounds are generous: they are there to
stop slips and values that would crash, hang or fill the memory, not to advise. Where a setting has no natural bound they are

- rounds, steps and periods 1 000 000; passes over data 10 000; clients 100 000; threads 1024
- batch sizes 65 536, but FedGen compares all pairs of a batch; widths of layers 8192 (two such layers: 67 million weights); numbers of images 1 000 000 000
- step sizes, weights of losses and norms 1e6, far from where float32 overflows
- times 1e8 seconds, three years; texts 4096 characters, the longest path of Linux
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Value = bool | int | float | str
LARGEST_INT = 2**63 - 1  # Flower carries whole numbers of 64 bits


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The values that one setting allows.

    Attributes:
        choices: If any, the only texts.
        low: Least number.
        high: Largest number.
        above: Numbers are larger than this.
        longest: Greatest length of a text, in characters.
        empty: Whether a text may be empty.
    """

    choices: tuple[str, ...]
    low: float
    high: float
    above: float
    longest: int
    empty: bool


def option(
    default: Value,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    longest: int = 4096,
    empty: bool = True,
) -> Any:
    """Declare one setting: its default, its meaning, and the values it allows (`low <= x <= high`, `x > above`).

    Raises:
        TypeError: A number without an upper or a lower bound.
    """
    is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
    if is_number and not (math.isfinite(high) and math.isfinite(max(low, above))):
        raise TypeError(f"option({default!r}, {help!r}): expected bounds `high`, and `low` or `above`; a number needs both")
    limits = Limits(choices=choices, low=low, high=high, above=above, longest=longest, empty=empty)
    return field(default=default, metadata={"help": help, "limits": limits})


def limits_of(metadata: Mapping[str, Any]) -> Limits:
    """Return the limits in the metadata of a field that `option` made."""
    limits = metadata["limits"]
    assert isinstance(limits, Limits)
    return limits


def shortened(value: object, most: int = 80) -> str:
    """Return `repr(value)` for a message; of a long one, its beginning and its length."""
    try:
        text = repr(value[: most + 1] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists within lists
        return f"a huge value of type {type(value).__name__}"
    if len(text) <= most + 2:
        return text
    return f"{text[:most]}... ({len(value) if isinstance(value, str) else len(text)} characters)"


def shown_key(key: str) -> str:
    """Return a key for a message: as it is, or quoted and shortened where it is long or has odd characters."""
    return key if key.isprintable() and key and len(key) <= 80 and " " not in key else shortened(key)
