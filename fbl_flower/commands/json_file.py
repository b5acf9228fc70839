"""Files of results: checked for a place before the work, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fbl_flower.errors import ConfigError, RunFailed


def check_no_folder(out: Path) -> None:
    """Refuse a file to write, before any work, if it is a folder."""
    if out.is_dir():
        raise ConfigError([f"--out: {out} is a folder; give the name of a file"])


def check_parent(out: Path | None) -> None:
    """Refuse a file to write, before any work, if it is a folder, or the folder that it is to lie in is not there."""
    if out is None:
        return
    check_no_folder(out)
    if not out.parent.is_dir():
        raise ConfigError([f"--out: no folder at {out.parent} for {out.name}; make it, or choose another"])


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; a reader sees the old file or the new one.

    Raises:
        RunFailed: The disk is full, or may not be written; nothing is left behind.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise unwritable_file(path, error) from error


def unwritable_file(path: Path, error: OSError) -> RunFailed:
    """Return the error of a file that cannot be written."""
    return RunFailed(
        f"{path} cannot be written ({error.strerror or error}); free space, mend its permissions, or choose another"
    )
