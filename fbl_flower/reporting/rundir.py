"""The run directory: everything that a run leaves behind.

config.toml          every setting of the run, as run-config keys
versions.json        Python and packages
metrics.jsonl        one line a round; the same bytes for the same seed, machine and thread count, on a CPU, unless privacy adds noise
timings.jsonl        one line a round, clock times, and each client's share of the traffic
nodes.json           the nodes, their clients, which of these are prepared or why not; who left and came back, the server among them
summary.json         status, final accuracy, what went wrong
checkpoint.safetensors   the last checkpoint: model, round, and what the server keeps for methods and its own step
model.safetensors    the final model
privacy.json         with privacy.noise-multiplier: in how many rounds each client was chosen, and the epsilon of that; never cut by a resume
generator.json       which generator the run uses, and why
generator/           a generator that the clients trained together; generator-rounds/: its rounds, in files as those above
choices.json         in simulation: how many kept images each replay kept again, and brought back, summed over the clients
averaged.safetensors     its average over rounds, with server.average
*.png                pictures
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fbl_flower.config import RunConfig, flat_table, flatten, read_toml_file, to_toml
from fbl_flower.errors import ConfigError, StateError
from fbl_flower.params import Arrays
from fbl_flower.whole_file import replacing

_PACKAGES = ("fbl-flower", "flwr", "torch", "torchvision", "diffusers", "optimum-quanto", "numpy")
# What may change when a run is resumed: it does not touch what a round computes. The number of rounds may only be raised.
MAY_CHANGE_ON_RESUME = frozenset({
    "resume", "num-server-rounds", "output-dir", "checkpoint-every", "timeout", "pictures", "prepare.timeout", "prepare.quorum",
})  # fmt: skip
_EMBEDDINGS = "alignment-embeddings"  # name of the averaged vectors beside the model's own names
_METHOD = "method-state/"  # before a method's name, "/", and the name of an array that the server keeps for it


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a resumed run starts.

    Attributes:
        server_round: The last finished round.
        arrays: The global model after it.
        embeddings: Averaged alignment vectors, where that setting is on.
        method_state: What the server keeps for methods, by method and name.
        data: What the server read, as `DataParts.identity`.
    """

    server_round: int
    arrays: Arrays
    embeddings: np.ndarray | None
    method_state: dict[str, Arrays] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    def check_data(self, now: Mapping[str, str]) -> None:
        """Refuse to go on with other images or classes than before; raises `StateError`, which names the difference."""
        if not self.data:
            raise StateError(
                "resume: the checkpoint does not say which images it is of (an older version wrote it). Start a new run."
            )
        changes = [f"{part}: {self.data.get(part)} before, {now[part]} now" for part in now if self.data.get(part) != now[part]]
        if changes:
            text = "; ".join(changes)
            raise StateError(f"resume: the data set has changed since the run began ({text}). Restore it, or start a new run.")


class RunDirectory:
    """One run's folder. Use `create` or `reopen`.

    Attributes:
        path: The folder; its name is the run's identity, the same before and after a resume.
        restart: What a reader should know of the restart; empty for a new run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restart = ""

    @property
    def identity(self) -> str:
        return self.path.name

    @property
    def generator(self) -> Path:
        """The folder of a generator that the clients trained together in this run."""
        return self.path / "generator"

    @property
    def generator_rounds(self) -> RunDirectory:
        """What the rounds that trained it leave behind: metrics, timings, and a checkpoint."""
        return RunDirectory(self.path / "generator-rounds")

    @classmethod
    def create(cls, config: RunConfig) -> RunDirectory:
        """Make a new folder below `output-dir` and write down the settings and versions."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        run = cls(Path(config.output_dir).expanduser().resolve() / name)
        try:
            run.path.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(
                [f"output-dir: cannot make {run.path} ({error.strerror}); choose a folder that can be written"]
            ) from error
        (run.path / "config.toml").write_text(to_toml(flatten(config)), encoding="utf-8")
        versions = {"python": platform.python_version()}
        for package in _PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "not installed"
        run.write_json("versions.json", versions)
        return run

    @classmethod
    def reopen(cls, config: RunConfig, *, data: Mapping[str, str]) -> tuple[RunDirectory, Checkpoint | None]:
        """Open the folder of `config.resume` to go on from its checkpoint, and note that in nodes.json.

        There is no such checkpoint yet, and None is returned, where the run was killed while its clients trained a generator.

        Later lines of metrics and timings are cut off. The summary is removed if rounds are to come; if it says that the run failed, its
        reason is in the note.

        Its config.toml gets what may change: the run that is killed again goes on to the new number of rounds.

        Args:
            config: Its `resume` is the folder.
            data: What the server reads now, as `DataParts.identity`.

        Raises:
            ConfigError: A setting that decides the results differs from the first part's.
            StateError: There is no folder, no checkpoint, or it is damaged or of other data. The folder is left as it was.
        """
        run = cls(Path(config.resume).expanduser().resolve())
        try:
            before = run.read_settings()
        except (OSError, ValueError) as error:
            raise StateError(f"resume: {run.path} is not the directory of a run ({error})") from error
        problems = [
            f"{key}: got {now!r}; the run to resume has {then!r}, and it decides the results"
            for key, (then, now) in changed_settings(before, flatten(config)).items()
        ]
        rounds = int(before.get("num-server-rounds", 0))
        if config.num_server_rounds < rounds:
            problems.append(
                f"num-server-rounds: got {config.num_server_rounds}; the run to resume has {rounds}, which may only be raised"
            )
        if problems:
            raise ConfigError(problems)
        in_generator_rounds = not run.has_checkpoint() and run.generator_rounds.has_checkpoint()
        newest = (run.generator_rounds if in_generator_rounds else run).read_checkpoint()
        newest.check_data(data)
        checkpoint, last_round = (None, -1) if in_generator_rounds else (newest, newest.server_round)
        _replace(run.path / "config.toml", to_toml(flatten(config) | {"resume": ""}).encode())
        run.cut_rows(last_round)
        longer = ""
        if config.num_server_rounds > rounds:
            run._forget_last_tuning(config)
        if config.num_server_rounds > rounds and config.train.schedule != "constant":
            longer = (
                f"; num-server-rounds was {rounds} and is {config.num_server_rounds}: train.schedule {config.train.schedule!r} follows the "
                "new number from here on, so the result is not that of one unbroken run"
            )
        run.restart = run._note_restart(last_round + 1, last=config.num_server_rounds, longer=longer)
        return run, checkpoint

    def read_settings(self) -> dict[str, Any]:
        """Return the settings with which the run was started."""
        return flat_table(read_toml_file(self.path / "config.toml"))

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one line of JSON to a file."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of JSON, whole or not at all."""
        _replace(self.path / name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """Read the lines of a file of JSON lines; none if it is not there."""
        path = self.path / name
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a file of JSON; nothing if it is not there."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_model(self, arrays: Arrays, name: str = "model.safetensors") -> None:
        """Write a final model."""
        _replace(self.path / name, save(_contiguous(arrays)))

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the last checkpoint."""
        tensors = dict(checkpoint.arrays)
        if checkpoint.embeddings is not None:
            tensors[_EMBEDDINGS] = checkpoint.embeddings
        for method, arrays in checkpoint.method_state.items():
            tensors |= {f"{_METHOD}{method}/{name}": array for name, array in arrays.items()}
        blob = save(
            _contiguous(tensors),
            metadata={"server_round": str(checkpoint.server_round), "data": json.dumps(dict(checkpoint.data))},
        )
        _replace(self.path / "checkpoint.safetensors", blob)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, damaged or not."""
        return (self.path / "checkpoint.safetensors").exists()

    def read_checkpoint(self) -> Checkpoint:
        """Read the last checkpoint; raises `StateError` if there is none or it is damaged."""
        path = self.path / "checkpoint.safetensors"
        try:
            with safe_open(path, "numpy") as file:
                arrays = {name: file.get_tensor(name) for name in list(file.keys())}
                metadata = file.metadata()
                server_round, data = int(metadata["server_round"]), json.loads(metadata.get("data", "{}"))
        except FileNotFoundError as error:
            raise StateError(
                f"resume: {self.path} has no checkpoint: the run ended before its first; start it again"
            ) from error
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"resume: {path} is damaged ({error}); start the run again") from error
        method_state: dict[str, Arrays] = {}
        for name in [name for name in arrays if name.startswith(_METHOD)]:
            method, own_name = name.removeprefix(_METHOD).split("/", 1)
            method_state.setdefault(method, {})[own_name] = arrays.pop(name)
        return Checkpoint(
            server_round=server_round,
            embeddings=arrays.pop(_EMBEDDINGS, None),
            arrays=arrays,
            method_state=method_state,
            data=data,
        )

    def knows_its_data(self) -> bool:
        """Tell whether the checkpoint says which data it is of; older versions wrote none of it, and cannot be resumed."""
        newest = self if self.has_checkpoint() else self.generator_rounds
        try:
            with safe_open(newest.path / "checkpoint.safetensors", "numpy") as file:
                return "data" in (file.metadata() or {})
        except (OSError, SafetensorError):
            return False

    def _forget_last_tuning(self, config: RunConfig) -> None:
        """Give the last line of metrics the model that a longer run resumes from, where that is not the tuned one."""
        rows = self.read_rows("metrics.jsonl")
        if rows and not config.server_tuning.every and "untuned_accuracy" in rows[-1]:
            for name in ("accuracy", "loss"):
                rows[-1][name] = rows[-1].pop(f"untuned_{name}")
            _replace(self.path / "metrics.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())

    def _note_restart(self, server_round: int, *, last: int, longer: str) -> str:
        summary, event = self.read_json("summary.json"), "started again"
        if summary.get("status") == "failed":
            event += f" after a failure: {summary['reason']}"
        event += longer
        table = {"nodes": [], "events": []} | self.read_json("nodes.json")
        table["events"].append({"round": server_round, "name": "server", "event": event})
        self.write_json("nodes.json", table)
        if summary.get("status") == "failed" or server_round <= last:
            (self.path / "summary.json").unlink(missing_ok=True)
        return event

    def cut_rows(self, last_round: int) -> None:
        """Remove what metrics and timings say of rounds after `last_round`."""
        for name in ("metrics.jsonl", "timings.jsonl"):
            self._cut(name, last_round)

    def _cut(self, name: str, last_round: int) -> None:
        kept = []
        for line in (self.path / name).read_text(encoding="utf-8").splitlines() if (self.path / name).exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # the kill came in the middle of a line
            if row["round"] <= last_round:
                kept.append(line + "\n")
        _replace(self.path / name, "".join(kept).encode())


def _contiguous(arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {name: np.ascontiguousarray(array) if array.ndim else array.copy() for name, array in arrays.items()}


def _replace(path: Path, blob: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(blob)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that decide the results and differ, with both values; one that `before` did not know had its default."""
    defaults = flatten(RunConfig())
    pairs = {key: (before.get(key, defaults.get(key)), now.get(key)) for key in sorted(now.keys() | before.keys())}
    return {key: pair for key, pair in pairs.items() if key not in MAY_CHANGE_ON_RESUME and pair[0] != pair[1]}
