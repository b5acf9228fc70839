"""Files of results: checked for a place before the work, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fbl_flower.errors import ConfigError, RunFailed
from fbl_flower.whole_file import part_of, replacing


def check_place(out: Path | None, *, make_folder: bool = False) -> None:
    """Refuse a file to write, now and not after the work, if it is a folder, or nothing can be written where it is to lie.

    Args:
        out: The file; None: none is wanted.
        make_folder: Make the folder that it is to lie in, if it is not there.

    Raises:
        ConfigError: It is a folder, or has none to lie in.
        RunFailed: That may not be written.
    """
    if out is None:
        return
    if out.is_dir():
        raise ConfigError([f"--out: {out} is a folder; give the name of a file"])
    part = part_of(out)
    try:
        if make_folder:
            out.parent.mkdir(parents=True, exist_ok=True)
        if not out.parent.is_dir():
            raise ConfigError([f"--out: no folder at {out.parent} for {out.name}; make it, or choose another"])
        part.touch()
        part.unlink()
    except OSError as error:
        raise unwritable_file(out, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; a reader sees the old file or the new one.

    Raises:
        ValueError: A number is not finite, which JSON does not know; what is undefined has to be None.
        RunFailed: The disk is full, or may not be written; nothing is left behind.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    try:
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable_file(path, error) from error


def unwritable_file(path: Path, error: OSError) -> RunFailed:
    """Return the error of a file that cannot be written."""
    return RunFailed(
        f"{path} cannot be written ({error.strerror or error}); free space, mend its permissions, or choose another"
    )
