"""The list of class names: between commas, as a JSON list, or in a file."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fbl_flower.config.options import shortened
from fbl_flower.config.toml import read_text


def read_class_names(text: str) -> tuple[str, ...]:
    """Return the names in a value of `data.classes`, in Unicode's form NFC; none where it is empty.

    Between commas, blanks around a name are no part of it. A JSON list keeps each name as it is.

    Raises:
        ValueError: It begins like a JSON list, and is none of texts; or a name has a NUL.
    """
    text = unicodedata.normalize("NFC", text.strip())
    if not text.startswith("["):
        return tuple(name.strip() for name in text.split(",")) if text else ()
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, json.JSONDecodeError) else "lists within lists, or a huge number"
        raise ValueError(f"{shortened(text)}, which begins like a JSON list and is none ({reason})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{shortened(text)}, a JSON list that holds more than texts")
    if odd := next((name for name in names if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in name)), None):
        raise ValueError(f"{shortened(text)}, with the name {shortened(odd)}, which no file can have")
    return tuple(unicodedata.normalize("NFC", name) for name in names)  # a JSON escape may hold any letter


def write_class_names(names: Sequence[str]) -> str:
    """Return the names as a JSON list without apostrophes, so that it fits between single quotes in TOML and on a command line."""
    return json.dumps(list(names), ensure_ascii=False).replace("'", "\\u0027")


def expand_class_file(text: str) -> str:
    """Return `@FILE` as the JSON list of the names in it, one a line or a JSON list in UTF-8; other text as it is.

    Raises:
        ValueError: The file cannot be read, or holds no names.
    """
    if not text.startswith("@"):
        return text
    try:
        file = Path(os.fsdecode(text[1:].strip().encode("utf-8", "surrogateescape"))).expanduser()
        content = read_text(file)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no such home directory
        raise ValueError(
            f"{shortened(text)}, a file that cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    lines = (line.strip() for line in content.split("\n"))
    names = read_class_names(content) if content.lstrip().startswith("[") else [line for line in lines if line]
    if not names:
        raise ValueError(f"{shortened(text)}, a file without names")
    return write_class_names(names)
