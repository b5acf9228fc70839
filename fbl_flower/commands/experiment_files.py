"""Files of experiments: a row says what differs, and the `_base.toml` of its folder says what all rows share.

A base may be based on another (`base = "../other/_base.toml"`), and each file may hold a part for a size, `[cpu]` or `[paper]`. What is
laid over what, the later over the earlier: the outermost base, its size, the folder's base, its size, the row, its size, the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbl_flower.config import Value, flat_table, read_toml_file, shortened, shown_key
from fbl_flower.errors import ConfigError

SIZES = ("cpu", "paper")
BASE = "_base.toml"
_OF_SIZE = ("report-rounds", "target-accuracy", "note", "config")
_OF_ROW = ("title", "kind", *_OF_SIZE, *SIZES)
_OF_BASE = ("base", *_OF_SIZE, *SIZES)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """A row's files, laid over each other.

    Attributes:
        values: What holds besides the settings: title, kind, report-rounds, target-accuracy.
        settings: Run-config keys; not yet checked.
        origin: Of each setting and value, the file that gave it last, or "-c".
        notes: The notes of all files that have one, outermost first.
        size: One of `SIZES`, or empty for a row that has one size only.
        problems: What is wrong with the form of the files, each beginning with the file; what is wrong is not in the rest.
    """

    values: dict[str, Any]
    settings: dict[str, Value]
    origin: dict[str, str]
    notes: tuple[str, ...]
    size: str
    problems: tuple[str, ...]


def read_layers(file: Path, *, size: str | None, overrides: Mapping[str, Value]) -> Layers:
    """Read a row and its bases.

    Args:
        file: The row's TOML file.
        size: One of `SIZES`; None: `cpu` where there is one, else `paper`.
        overrides: Settings from the command line.

    Raises:
        ConfigError: A file cannot be read as TOML; lists all of them.
    """
    problems: list[str] = []
    chain = _chain(file, problems)
    if problems:
        raise ConfigError(problems)
    sizes = [name for name in SIZES if any(name in raw for _, raw in chain)]
    chosen = (size or sizes[0]) if sizes else ""
    if chosen and chosen not in sizes:
        problems.append(f"{file}: --size: got {chosen!r}; it has {' and '.join(sizes)} only")
    if size and not sizes:
        problems.append(f"{file}: --size: got {size!r}; it has one size only, leave the option out")
    values: dict[str, Any] = {}
    settings: dict[str, Value] = {}
    origin: dict[str, str] = {}
    notes: list[str] = []
    for path, raw in chain:
        allowed = _OF_ROW if path == file else _OF_BASE
        problems += [
            f"{path}: {shown_key(key)}: unknown key; allowed: {', '.join(allowed)}" for key in raw if key not in allowed
        ]
        for name in SIZES:  # the other size's part must be well-formed too
            part = raw.get(name, {})
            if not isinstance(part, dict):
                problems.append(f"{path}: {name}: got {shortened(part)}; wanted a table")
                continue
            problems += [
                f"{path}: {name}.{shown_key(key)}: unknown key; allowed: {', '.join(_OF_SIZE)}"
                for key in part
                if key not in _OF_SIZE
            ]
        for layer in (raw, raw.get(chosen, {})):
            if not isinstance(layer, dict):
                continue
            table, note = layer.get("config", {}), layer.get("note", "")
            if isinstance(table, dict):
                flat = flat_table(table)
                settings |= flat
                origin |= dict.fromkeys(flat, str(path))
            else:
                problems.append(f"{path}: config: got {shortened(table)}; wanted a table of settings")
            if not isinstance(note, str):
                problems.append(f"{path}: note: got {shortened(note)}; wanted text")
            elif note:
                notes.append(note)
            own = {key: value for key, value in layer.items() if key not in ("base", "note", "config", *SIZES)}
            values |= own
            origin |= dict.fromkeys(own, str(path))
    return Layers(
        values=values,
        settings=settings | dict(overrides),
        origin=origin | dict.fromkeys(overrides, "-c"),
        notes=tuple(notes),
        size=chosen,
        problems=tuple(problems),
    )


def _chain(file: Path, problems: list[str]) -> list[tuple[Path, dict[str, Any]]]:
    """Return a row and its bases with what they hold, the outermost base first; files that cannot be read become problems."""
    found: list[tuple[Path, dict[str, Any]]] = []
    beside = file.parent / BASE
    path: Path | None = file
    seen: set[Path] = set()
    while path is not None:
        if path.resolve() in seen:
            problems.append(f"{path}: base: leads back to this file")
            break
        seen.add(path.resolve())
        try:
            raw = read_toml_file(path)
        except (OSError, ValueError) as error:
            problems.append(f"{path}: cannot be read as TOML: {error}")
            raw = {}
        found.append((path, raw))
        if path == file:
            path = beside if beside.exists() else None
            continue
        named = raw.get("base")
        if named is not None and not (isinstance(named, str) and named.isprintable()):
            problems.append(f"{path}: base: got {shortened(named)}; wanted the path of a file, from this one's folder")
            named = None
        path = path.parent / named if named else None
    return found[::-1]
