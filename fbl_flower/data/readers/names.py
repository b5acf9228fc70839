"""File names as text: UTF-8 in every locale, and safe to print.

Python decodes names with the locale's encoding, which is ASCII under `LC_ALL=C`. Bytes that it cannot decode become lone surrogates,
which no file and no terminal takes. Here the bytes on disk count.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePath

from fbl_flower.errors import DataError


def class_name(text: str) -> str:
    """Return a class name in Unicode's form NFC: archives of macOS store an accent apart from its letter, other systems do not."""
    return unicodedata.normalize("NFC", text)


def name_of(path: PurePath) -> str:
    """Return the last part of a path as text in form NFC.

    Raises:
        DataError: The name is not UTF-8.
    """
    try:
        return class_name(os.fsencode(path.name).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.path: the name of {os.fsencode(path)!r} is not UTF-8, so its class cannot be known. Rename it, for example with convmv"
        ) from error


def disk_path(text: str) -> Path:
    """Return the path that a setting names; the bytes on disk are UTF-8, also where the locale's encoding is not."""
    return Path(os.fsdecode(text.encode("utf-8", "surrogateescape"))).expanduser()


def shown(path: PurePath | str) -> str:
    """Return a path for a message: UTF-8 where it is that, and escapes for all other bytes."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
