"""Settings from the command line: `-c "key=value ..."` in Flower's syntax, TOML files, and those of a run to go on with."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fbl_flower.config import (
    RunConfig,
    Value,
    flat_table,
    flatten,
    parse_config,
    parse_toml,
    read_toml_file,
    shortened,
    shown_key,
)
from fbl_flower.errors import ConfigError
from fbl_flower.reporting.rundir import MAY_CHANGE_ON_RESUME, changed_settings

# Flower's own pattern (flwr.common.config.parse_config_args), but for the bound on keys: without it, long text takes quadratic time
_PAIR = re.compile(r"(\S{1,100}?)=('[^']*'|\"[^\"]*\"|\S+)")
_PATHS = ("output-dir", "state-dir", "data.path", "generator.path", "resume")
_ROUNDS = "num-server-rounds"


def read_overrides(arguments: Sequence[str]) -> dict[str, Value]:
    """Read the arguments of `-c`: pairs `key=value` with TOML values, or TOML files; a later one wins.

    Flower takes one file or pairs, skips over text that is no pair, and of several `-c` with keys of one table (`data.`) keeps
    only the last one's. Here files and pairs may be mixed, such text is an error, and no key is lost.

    Raises:
        ConfigError: Lists every piece that is no pair, every value that is no TOML, and every file that cannot be read.
    """
    found, problems = _scan(arguments)
    if problems:
        raise ConfigError(problems)
    return found


def read_toml(path: Path) -> dict[str, Value]:
    """Read a TOML file of settings; tables become dotted keys."""
    try:
        return flat_table(read_toml_file(path.expanduser()))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no such home directory
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([f"{shown_key(str(path))}: cannot be read as TOML: {reason}"]) from error


def chosen_config(arguments: Sequence[str], *, resume: Path | None = None) -> tuple[RunConfig, dict[str, Value]]:
    """Validate what the user asked for.

    Relative paths are made absolute: the server and the clients run in other directories than the user's.

    Args:
        arguments: Those of `-c`.
        resume: Run directory of a killed run to go on with: its settings hold, and `-c` may only raise the number of rounds.

    Returns:
        The configuration, and its settings that differ from the defaults.

    Raises:
        ConfigError: Lists all problems.
    """
    asked, problems = _scan(arguments)
    if resume is not None and not problems:
        asked = _resumed(resume, asked)
    asked = absolute_paths(asked)
    config = parse_config(asked, found=problems)
    defaults = flatten(RunConfig())
    return config, {key: value for key, value in flatten(config).items() if value != defaults[key]}


def absolute_paths(settings: Mapping[str, Value]) -> dict[str, Value]:
    """Return the settings with relative paths made absolute; one that begins with `~`, or is on the hub, stays as it is."""
    found = dict(settings)
    for key in _PATHS:
        value = found.get(key)
        if isinstance(value, str) and value and not value.startswith(("~", "hf://")) and (key, value) != ("resume", "auto"):
            found[key] = _as_utf8(os.path.abspath(value))
    return found


def _scan(arguments: Sequence[str]) -> tuple[dict[str, Value], list[str]]:
    """Read the arguments of `-c`; return what can be read, and what is wrong with the rest."""
    found: dict[str, Value] = {}
    problems: list[str] = []
    for raw in arguments:
        argument = _as_utf8(raw)
        if argument.strip().endswith(".toml") and "=" not in argument:
            try:
                found |= read_toml(Path(argument.strip()))
            except ConfigError as error:
                problems += error.problems
            continue
        pieces = _PAIR.split(argument)  # text, key, value, text, key, value, ..., text
        for rest in " ".join(pieces[::3]).split():
            problems.append(f"-c: got {shortened(rest)}; wanted key=value, without spaces around the '='")
        for key, text in zip(pieces[1::3], pieces[2::3], strict=True):
            try:
                found |= flat_table(parse_toml(f"{key} = {text}"))
            except ValueError:
                shown = text if len(text) <= 80 and text.isprintable() else shortened(text)
                problems.append(
                    f"{shown_key(key)}: got {shown}, which is no TOML value; wanted true, false, a number, or text in quotes ('{shown}')"
                )
    return found, problems


def _as_utf8(text: str) -> str:
    """Decode what an ASCII locale has left undecoded in an argument or a path."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _resumed(folder: Path, asked: dict[str, Value]) -> dict[str, Value]:
    file = folder.expanduser() / "config.toml"
    if not file.is_file():
        raise ConfigError([f"--resume: no file {file}; wanted the run directory of an earlier run, on this machine"])
    settings = read_toml(file)
    may_change = sorted(MAY_CHANGE_ON_RESUME - {_ROUNDS, "resume"})
    problems = [
        f"{key}: got {shortened(now)}; the run to resume has {shortened(then)}. Of its settings, {_ROUNDS} may be raised, and {', '.join(may_change)} may change"
        for key, (then, now) in changed_settings(settings, settings | asked).items()
    ]
    rounds, before = asked.get(_ROUNDS), settings.get(_ROUNDS)
    if isinstance(rounds, int) and isinstance(before, int) and rounds < before:
        problems.append(f"{_ROUNDS}: got {rounds}; the run in {folder} has {before}, which may only be raised")
    if problems:
        raise ConfigError(problems)
    return settings | asked | {"resume": str(folder.expanduser().resolve())}
