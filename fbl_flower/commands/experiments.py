"""One row of a results table: a TOML file with a title, a kind, and settings that differ from the defaults."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fbl_flower.commands.experiment_files import read_layers
from fbl_flower.config import AUTO, RunConfig, Value, flatten, parse_config, shortened, to_toml
from fbl_flower.data.info import DATASETS
from fbl_flower.data.sources import files_digest
from fbl_flower.errors import ConfigError
from fbl_flower.generation.loading import bundled_generator
from fbl_flower.generation.recipe import RECIPE

KINDS = ("federation", "public-only", "synthetic-only")
_GIVEN_BY_THE_SWEEP = ("seed", "num-threads", "output-dir", "resume", "pictures")
_LONGEST_TITLE = 200  # characters; it is the first column of a table
# What says where things lie or when they are saved, and changes no number of a result.
_NO_NUMBERS = ("data.path", "state-dir", "checkpoint-every", "timeout", "prepare.timeout")
_BUNDLED = "generator.bundled"  # no setting: the content of the generator that comes with the package, where that is used
_FILES = "data.files"  # no setting: names and sizes of the user's own files, where those are the data


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row.

    Attributes:
        file: Its TOML file; the name without `.toml` names the row's folder of results.
        title: What the table shows.
        kind: One of `KINDS`.
        report_rounds: Rounds whose accuracy the table shows, in order; the last is the final one. Always final, never best.
        settings: Run-config keys that the files and the command line give.
        config: The whole configuration under them, with seed 0.
        size: `cpu`, `paper`, or empty for a row that has one size only.
        target: Accuracy, 0 .. 1, the way to which the table measures in rounds and bytes; None: none is set.
        notes: What a reader of the table has to know, such as in what a size is reduced.
        overrides: Run-config keys from the command line.
        target_overridden: Whether `target` is from the command line too.
    """

    file: Path
    title: str
    kind: str
    report_rounds: tuple[int, ...]
    settings: dict[str, Value]
    config: RunConfig
    size: str = ""
    target: float | None = None
    notes: tuple[str, ...] = ()
    overrides: dict[str, Value] = field(default_factory=dict)
    target_overridden: bool = False

    @property
    def name(self) -> str:
        return self.file.stem

    def command(self, seeds: Sequence[int]) -> str:
        """Return the command that gives the row's line again; a path on this machine is no part of it."""
        needed = {key: value for key, value in self.overrides.items() if key == "data.path" or key not in _NO_NUMBERS}
        shown = {key: "PATH" if key.endswith(".path") else value for key, value in needed.items()}
        pairs = [f"{key}={_for_command_line(value)}" for key, value in shown.items()]
        parts = ["fbl-flower", "sweep", str(self.file)]
        parts += ["--size", self.size] if self.size else []
        parts += ["--target-accuracy", f"{self.target:g}"] if self.target_overridden else []
        parts += ["-c", shlex.quote(" ".join(pairs))] if pairs else []
        return " ".join([*parts, "--seeds", ",".join(map(str, seeds))])

    @cached_property
    def identity(self) -> dict[str, Value]:
        """The settings that decide the row's numbers, as `identity` has them."""
        return identity(self.config, self.kind)

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """Name the settings in which a stored result was made otherwise; one that is newer than the result had its default."""
        now: dict[str, Any] = {"kind": self.kind} | self.identity
        defaults = identity(RunConfig())
        for name in (_BUNDLED, _FILES):
            defaults.pop(name, None)  # results of before it was noted say nothing of it
        before = {"kind": stored.get("kind")} | defaults | stored.get("config", {})
        return [
            f"{key}: {before[key]!r}, now {now.get(key, 'gone')!r}"
            for key in before
            if key not in (*_GIVEN_BY_THE_SWEEP, *_NO_NUMBERS) and before[key] != now.get(key)
        ]


def identity(config: RunConfig, kind: str = "federation") -> dict[str, Value]:
    """Return the settings that decide a result's numbers; a generator, and data of the user's own, are named by content, not by place."""
    settings = {key: value for key, value in flatten(config).items() if key not in (*_GIVEN_BY_THE_SWEEP, *_NO_NUMBERS)}
    if config.data.name in ("folder", "parquet"):
        settings[_FILES] = files_digest(config.data.path)
    if config.generator.path:
        folder = Path(config.generator.path).expanduser()
        settings["generator.path"] = f"{folder.name}@{_digest(folder)}"
    elif _generates(config, kind) and (bundled := bundled_of(config)):
        settings[_BUNDLED] = f"{bundled.name}@{_digest(bundled)}"
    return settings


def bundled_of(config: RunConfig) -> Path | None:
    """Return the folder of the bundled generator for a data set that has a name, whether there is one or not."""
    info = DATASETS.get(config.generator.trained_on or config.data.name)
    return bundled_generator(info.name, config.data.image_size or info.image_size) if info else None


def _for_command_line(value: Value) -> str:
    """Write a value as `-c` takes it, which knows no escapes: text with a double quote goes between single ones."""
    if isinstance(value, str) and '"' in value:
        return f"'{value}'"
    return to_toml({"key": value}).split(" = ", 1)[1].rstrip("\n")


def _generates(config: RunConfig, kind: str) -> bool:
    fills = config.balancing.enabled and config.balancing.filling
    wanted = kind == "synthetic-only" or (kind == "federation" and (fills or config.server_generates))
    return wanted and config.generator.name in (AUTO, "diffusion")


def _digest(folder: Path) -> str:
    try:
        return hashlib.sha256((folder / RECIPE).read_bytes()).hexdigest()[:12]  # it holds the digests of the other files
    except OSError:  # what loads it says so
        return "none"


def read_rows(
    paths: Sequence[Path],
    *,
    size: str | None = None,
    overrides: Mapping[str, Value] | None = None,
    target: float | None = None,
) -> list[Row]:
    """Read rows from files, and from the TOML files of folders in order of name; those that begin with `_` are no rows.

    Args:
        paths: Files and folders.
        size: `cpu` or `paper`; None: `cpu`, for rows that have sizes.
        overrides: Settings that hold for every row.
        target: In place of the files' own `target-accuracy`.

    Raises:
        ConfigError: Lists everything that is wrong in any of the files.
    """
    rows, problems = check_rows(paths, size=size, overrides=overrides, target=target)
    if problems:
        raise ConfigError(problems)
    return rows


def check_rows(
    paths: Sequence[Path],
    *,
    size: str | None = None,
    overrides: Mapping[str, Value] | None = None,
    target: float | None = None,
) -> tuple[list[Row], list[str]]:
    """Read rows as `read_rows` does; return those that are right, and everything that is wrong with the others."""
    problems: list[str] = []
    files: list[Path] = []
    for path in paths:
        found = _files_in(path) if path.is_dir() else [path]
        if not found:
            problems.append(f"{path}: no .toml file with a row in this folder")
        if path.name.startswith("_"):
            problems.append(f"{path}: holds what rows share, and is no row")
        files += [file for file in found if file not in files]
    rows = []
    for file in files:
        try:
            rows.append(_read_row(file, size, dict(overrides or {}), target))
        except ConfigError as error:
            problems += error.problems
    names: dict[str, Path] = {}
    for row in rows:
        if names.setdefault(row.name, row.file) != row.file:
            problems.append(f"{row.file}: has the name of {names[row.name]}; their results would be mixed up")
    if len({row.config.data.evaluate_on for row in rows}) > 1:
        problems.append(
            "data.evaluate-on: some rows are scored on test images and others on validation; give them to two sweeps"
        )
    return rows, list(dict.fromkeys(problems))  # a base's problem is one, however many rows share it


def read_beside(
    rows: Sequence[Row], *, size: str | None, overrides: Mapping[str, Value] | None, target: float | None
) -> list[Row]:
    """Read all rows of the folders that `rows` are of, in order of name, as `read_rows` does; those that cannot be read are left out."""
    found = []
    for folder in dict.fromkeys(row.file.parent for row in rows):
        for file in _files_in(folder):
            with contextlib.suppress(ConfigError):
                found.append(_read_row(file, size, dict(overrides or {}), target))
    return found


def twins(rows: Sequence[Row]) -> list[str]:
    """Name rows of the same title, and those that ask for the same, as happens where the command line sets what differs between two."""
    titles = _pairs(rows, lambda row: row.title)
    settings = _pairs(rows, lambda row: repr((row.kind, row.identity)))
    return [
        f"{row.file}: has the title of {one.file}, {row.title!r}; lines of a table need titles of their own"
        for one, row in titles
    ] + [
        f"{row.file}: asks for the same as {one.file}, so that one of their titles is wrong; leave one out, or change the settings (-c)"
        for one, row in settings
    ]


def _pairs(rows: Sequence[Row], key: Callable[[Row], str]) -> list[tuple[Row, Row]]:
    """Return each row whose key an earlier one has, behind the first that has it."""
    first: dict[str, Row] = {}
    pairs = [(first.setdefault(key(row), row), row) for row in rows]
    return [(one, row) for one, row in pairs if one is not row]


def _files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!_.]*.toml"))


def _read_row(file: Path, size: str | None, overrides: dict[str, Value], target: float | None) -> Row:
    layers = read_layers(file, size=size, overrides=overrides)
    problems = list(layers.problems)

    def wrong(key: str, text: str) -> None:
        problems.append(f"{layers.origin.get(key, file)}: {text}")

    title, kind = layers.values.get("title"), layers.values.get("kind")
    if not isinstance(title, str) or not title.isprintable() or not 0 < len(title) <= _LONGEST_TITLE:
        wrong("title", f"title: got {shortened(title)}; wanted text of one line, at most {_LONGEST_TITLE} characters")
    if kind not in KINDS:
        wrong("kind", f"kind: got {shortened(kind)}; allowed: {' | '.join(KINDS)}")
    for key in layers.settings:
        if key in _GIVEN_BY_THE_SWEEP:
            wrong(key, f"{key}: the sweep itself sets it; leave it out")
    config = RunConfig()
    try:
        config = parse_config(layers.settings)
    except ConfigError as error:
        for problem in error.problems:
            wrong(problem.split(":")[0], problem)
    rounds, last = layers.values.get("report-rounds", []), config.num_server_rounds
    if not isinstance(rounds, list) or any(type(r) is not int or not 1 <= r <= last for r in rounds):
        text = f"report-rounds: got {shortened(rounds)}; wanted a list of whole numbers from 1 to num-server-rounds, which is {last}"
        wrong("report-rounds", text)
        rounds = []
    if rounds and kind != "federation":
        wrong("report-rounds", f"report-rounds: got {shortened(rounds)}; only a federation has rounds")
    aim = layers.values.get("target-accuracy") if target is None else target
    if aim is not None and (type(aim) not in (int, float) or not 0 < aim <= 1):
        at = "--target-accuracy" if target is not None else layers.origin["target-accuracy"]
        problems.append(f"{at}: target-accuracy: got {shortened(aim)}; wanted a number > 0 and <= 1")
    if problems:
        raise ConfigError(problems)
    return Row(
        file=file,
        title=str(title),
        kind=str(kind),
        report_rounds=tuple(sorted({*rounds, last})),
        settings=layers.settings,
        config=config,
        size=layers.size,
        target=aim,
        notes=layers.notes,
        overrides=overrides,
        target_overridden=target is not None,
    )
