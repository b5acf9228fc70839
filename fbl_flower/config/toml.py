"""Settings as TOML, nested or flat, and small text files that hold them."""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbl_flower.config.options import Value

_MOST_BYTES = 4 * 2**20  # of a file: the longest lists of class names are a tenth of it
_DEEPEST = 16  # brackets within brackets, and parts of a dotted key; settings need three
_QUOTED = re.compile(  # texts and comments, also those without an end
    r'"""(?:[^"\\]++|\\.|"(?!""))*+(?:""")?'
    r"|'''(?:[^']++|'(?!''))*+(?:''')?"
    r'|"(?:[^"\\\n]++|\\[^\n])*+"?'
    r"|'[^'\n]*+'?"
    r"|#[^\n]*+",
    re.DOTALL,
)


def read_text(path: Path) -> str:
    """Return the text of a small file in UTF-8, without its byte order mark.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, too large, or not UTF-8; or the path is none.
    """
    with open(path, "rb", opener=_no_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES // 2**20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from error


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML whose nesting and numbers are within bounds, so that it takes no longer than its length suggests.

    Raises:
        ValueError: It is no TOML, or nested too deeply.
    """
    bare = _QUOTED.sub("", text)
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", bare):
        depth += 1 if bracket in "[{" else -1
        if depth > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} brackets within each other")
    if any(part.count(".") >= _DEEPEST for part in re.split(r"[=\n,{}\]]", bare)):
        raise ValueError(f"a key of more than {_DEEPEST} parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # a whole number of more digits than Python reads
        raise ValueError("a number of thousands of digits") from error


def read_toml_file(path: Path) -> dict[str, Any]:
    """Return what a small TOML file holds; raises OSError or ValueError."""
    return parse_toml(read_text(path))


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


def _no_waiting(path: str, flags: int) -> int:
    """Open a named pipe without waiting for its writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
