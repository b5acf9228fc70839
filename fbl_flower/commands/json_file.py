"""Files of results: checked for a place before the work, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fbl_flower.errors import ConfigError


def check_parent(out: Path | None) -> None:
    """Refuse a file to write, before any work, if the folder that it is to lie in is not there."""
    if out is not None and not out.parent.is_dir():
        raise ConfigError([f"--out: no folder at {out.parent} for {out.name}; make it, or choose another"])


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; a reader sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
