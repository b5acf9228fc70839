"""One row of a results table: a TOML file with a title, a kind, and settings that differ from the defaults."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbl_flower.config import RunConfig, Value, flat_table, flatten, parse_config
from fbl_flower.errors import ConfigError

KINDS = ("federation", "public-only", "synthetic-only")
_KEYS = ("title", "kind", "report-rounds", "config")
_GIVEN_BY_THE_SWEEP = ("seed", "num-threads", "output-dir", "resume", "pictures")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row.

    Attributes:
        file: Its TOML file; the name without `.toml` names the row's folder of results.
        title: What the table shows.
        kind: One of `KINDS`.
        report_rounds: Rounds whose accuracy the table shows, in order; the last is the final one. Always final, never best.
        settings: Run-config keys that the file gives.
        config: The whole configuration under them, with seed 0.
    """

    file: Path
    title: str
    kind: str
    report_rounds: tuple[int, ...]
    settings: dict[str, Value]
    config: RunConfig

    @property
    def name(self) -> str:
        return self.file.stem

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """Name the settings in which a stored result was made otherwise; a setting that is newer than the result is not one."""
        now: dict[str, Any] = {"kind": self.kind} | flatten(self.config)
        before = {"kind": stored.get("kind")} | stored.get("config", {})
        return [
            f"{key}: {before[key]!r}, now {now.get(key, 'gone')!r}"
            for key in before
            if key not in _GIVEN_BY_THE_SWEEP and before[key] != now.get(key)
        ]


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Read rows from files, and from the TOML files of folders in order of name.

    Raises:
        ConfigError: Lists everything that is wrong in any of the files.
    """
    problems: list[str] = []
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.toml")) if path.is_dir() else [path]
        if not found:
            problems.append(f"{path}: no .toml file in this folder")
        files += [file for file in found if file not in files]
    rows = []
    for file in files:
        try:
            rows.append(_read_row(file))
        except ConfigError as error:
            problems += [f"{file}: {problem}" for problem in error.problems]
    names: dict[str, Path] = {}
    for row in rows:
        if names.setdefault(row.name, row.file) != row.file:
            problems.append(f"{row.file}: has the name of {names[row.name]}; their results would be mixed up")
    if problems:
        raise ConfigError(problems)
    return rows


def _read_row(file: Path) -> Row:
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError([f"cannot be read as TOML: {error}"]) from error
    problems = [f"{key}: unknown key; allowed: {', '.join(_KEYS)}" for key in raw if key not in _KEYS]
    title, kind = raw.get("title"), raw.get("kind")
    if not isinstance(title, str) or not title:
        problems.append(f"title: got {title!r}; wanted text")
    if kind not in KINDS:
        problems.append(f"kind: got {kind!r}; allowed: {' | '.join(KINDS)}")
    table = raw.get("config", {})
    settings = flat_table(table) if isinstance(table, dict) else {}
    if not isinstance(table, dict):
        problems.append(f"config: got {table!r}; wanted a table of settings")
    problems += [f"{key}: the sweep itself sets it; leave it out" for key in settings if key in _GIVEN_BY_THE_SWEEP]
    config = RunConfig()
    try:
        config = parse_config(settings)
    except ConfigError as error:
        problems += error.problems
    rounds = raw.get("report-rounds", [])
    last = config.num_server_rounds
    if not isinstance(rounds, list) or any(type(r) is not int or not 1 <= r <= last for r in rounds):
        problems.append(
            f"report-rounds: got {rounds!r}; wanted a list of whole numbers from 1 to num-server-rounds, which is {last}"
        )
        rounds = []
    if rounds and kind != "federation":
        problems.append(f"report-rounds: got {rounds!r}; only a federation has rounds")
    if problems:
        raise ConfigError(problems)
    report = tuple(sorted({*rounds, last}))
    return Row(file=file, title=str(title), kind=str(kind), report_rounds=report, settings=settings, config=config)
