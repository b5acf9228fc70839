"""One job of a sweep: a row under a seed, in a process of its own.

A federation's run directory lies in `runs/SEED` beside the result until that is written. A job that was killed goes on from there.
The job keeps other processes from that folder, and ends with the sweep that started it, however that ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fbl_flower.claim import Claim
from fbl_flower.commands.experiments import Row, read_rows
from fbl_flower.commands.job_memory import memory_of
from fbl_flower.commands.json_file import write_json
from fbl_flower.config import FEDERATED, RunConfig, Value, parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.device import pick_device, precision_on
from fbl_flower.errors import ConfigError, FBLError, RunFailed, StateError

_PATIENCE = 5.0  # seconds for a job whose sweep was killed to end
LEFT = 3  # exit code of a job that another process is running
_ROUNDS = "num-server-rounds"
_IDENTITY = "identity.json"  # beside the runs of a job: what decides their numbers, generators and images by content
_BYTES = ("bytes_to_clients", "bytes_from_clients")
_OTHER_SCORES = (
    "untuned_accuracy",
    "averaged_accuracy",
    "epsilon",
)  # before the server tuned it; its average over rounds; privacy


def run_one(row: Row, seed: int, *, keep: Path) -> dict[str, Any]:
    """Run a row under a seed in this process and return its result, as it is stored.

    Args:
        row: The row.
        seed: Of the run.
        keep: Folder for the run directory; a run that was killed there goes on from its checkpoint.
    """
    config = _config(row, seed, keep)
    begin = time.perf_counter()
    measured: dict[str, Any] = {}
    earlier = 0.0
    if row.kind == "federation":
        measured, earlier = _run_federation(config)
    else:
        from fbl_flower.training.central import run_central

        config = _with_federated_generator(config, row.kind)
        accuracy = run_central(config, "public" if row.kind == "public-only" else "synthetic")
        measured["accuracy"] = {str(config.num_server_rounds): accuracy}
    last = config.num_server_rounds
    wanted = range(1, last + 1) if row.kind == "federation" else (last,)
    if missing := [str(number) for number in wanted if str(number) not in measured["accuracy"]]:
        raise RunFailed(f"{row.file}, seed {seed}: the run has no accuracy of round {', '.join(missing)}")
    memory = memory_of(os.getpid())
    return {
        "title": row.title,
        "kind": row.kind,
        "size": row.size,
        "seed": seed,
        "seconds": round(earlier + time.perf_counter() - begin, 1),
        "peak_bytes": memory[1] if memory else None,
        "ran_on": place_of(config),
        **measured,
        "config": row.identity | {"seed": seed},
    }


def folder_of_runs(result: Path) -> Path:
    """Return the folder in which a job keeps its run until its result is written."""
    return result.parent / "runs" / result.stem


def unfinished_otherwise(row: Row, seed: int, keep: Path) -> list[str]:
    """Name the runs that were killed in `keep` and cannot be gone on with: they have other settings, another generator or other images."""
    from fbl_flower.config import flatten
    from fbl_flower.reporting.rundir import RunDirectory, changed_settings

    now, problems = flatten(_config(row, seed, keep)), []
    for found in _runs_in(keep):
        try:
            before = RunDirectory(found).read_settings()
        except (OSError, ValueError):  # no run, or killed while it began
            continue
        changed = changed_settings(before, now)
        if before.get(_ROUNDS) != now[_ROUNDS]:  # a run may be prolonged, a row has its length
            changed[_ROUNDS] = before.get(_ROUNDS), now[_ROUNDS]
        differences = [f"{key}: {then!r}, now {value!r}" for key, (then, value) in changed.items()]
        if text := "; ".join(differences or _other_content(row, keep)):
            problems.append(f"{found}: begun with other settings ({text}); delete it, or use another --out")
    return problems


def place_of(config: RunConfig) -> str:
    """Say on what kind of device, and in which precision, a run with this configuration is computed here."""
    device = pick_device(config)
    return f"{device.type} in {precision_on(device, config.train.precision)}"


def note_identity(row: Row, keep: Path, place: str) -> list[str]:
    """Note beside a job's runs what decides their numbers, before the first of them begins; return all places that they ran on, in order."""
    try:
        noted = json.loads((keep / _IDENTITY).read_text(encoding="utf-8")) if _runs_in(keep) else {}
    except (OSError, ValueError):
        noted = {}
    places = [*noted.get("ran_on", ())]
    if place not in places[-1:]:
        places.append(place)
        write_json(keep / _IDENTITY, {"kind": row.kind, "config": row.identity} | noted | {"ran_on": places})
    return places


def _other_content(row: Row, keep: Path) -> list[str]:
    """Name what the runs in `keep` were begun with and is not there any more; nothing where that was not noted."""
    try:
        return row.differences(json.loads((keep / _IDENTITY).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def _runs_in(keep: Path) -> list[Path]:
    return sorted(run for run in keep.iterdir() if run.is_dir()) if keep.is_dir() else []


def remove_run(row: Row, seed: int, keep: Path) -> None:
    """Remove what a finished job's federation left: its run directories, and what its clients remember of them."""
    from fbl_flower.federation.client import state_folder

    for run in _runs_in(keep):
        shutil.rmtree(state_folder(row.config.state_dir, run.name, 0).parent, ignore_errors=True)
    shutil.rmtree(keep, ignore_errors=True)
    with contextlib.suppress(OSError):  # other seeds' runs are there
        keep.parent.rmdir()


def _config(row: Row, seed: int, keep: Path) -> RunConfig:
    settings: dict[str, Value] = row.settings | {"seed": seed, "num-threads": 1, "pictures": False, "output-dir": str(keep)}
    return parse_config(settings)


def _with_federated_generator(config: RunConfig, kind: str) -> RunConfig:
    """Have the clients train the generator that a row without a federation generates with, if it is of that kind."""
    from fbl_flower.federation.local import run_local
    from fbl_flower.reporting.rundir import RunDirectory

    chosen = config.generator
    if kind != "synthetic-only" or chosen.name != FEDERATED or chosen.path:
        return config
    alone = replace(config, num_server_rounds=0, checkpoint_every=1, resume="auto")
    folder = RunDirectory(run_local(alone, workers=1).run_dir).generator
    return replace(config, generator=replace(chosen, path=str(folder)))


def _run_federation(config: RunConfig) -> tuple[dict[str, Any], float]:
    """Run a federation, or go on with one; return what the result keeps, and the seconds that the earlier part took."""
    from fbl_flower.commands.wrong_labels import wrong_label_shares
    from fbl_flower.federation.local import run_local

    path, earlier = _earlier_part(config)
    outcome = run_local(replace(config, resume=path), workers=1)
    text = (outcome.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in text.splitlines()]
    measured: dict[str, Any] = {"accuracy": {str(entry["round"]): float(entry["accuracy"]) for entry in metrics}}
    for name in _OTHER_SCORES:
        if scores := {str(entry["round"]): float(entry[name]) for entry in metrics if name in entry}:
            measured[name] = scores
    for name in _BYTES:
        if sent := {str(entry["round"]): int(entry[name]) for entry in metrics if entry.get(name) is not None}:
            measured[name] = sent
    for name in ("not_prepared", "left_out"):  # who did not take part, and why: such a result is of fewer clients
        if outcome.summary[name]:
            measured[name] = outcome.summary[name]
    if shares := wrong_label_shares(config, outcome.run_dir.name):
        measured["wrong_labels"] = shares
    return measured, earlier


def _earlier_part(config: RunConfig) -> tuple[str, float]:
    """Return the directory of a run that was killed and can go on, and the seconds up to its checkpoint; else "" and 0."""
    from fbl_flower.reporting.rundir import RunDirectory

    folder = Path(config.output_dir)
    for found in reversed(_runs_in(folder)):
        try:
            run, point = RunDirectory.reopen(replace(config, resume=str(found)), data=load_parts(config.data).identity)
        except StateError as error:
            print(f"starts afresh, not from {found}: {error}", flush=True)
            shutil.rmtree(found, ignore_errors=True)
            continue
        where = f"after round {point.server_round}" if point else "with its generator's training"
        print(f"goes on {where} of {found}", flush=True)
        timings = run.read_rows("timings.jsonl") + run.generator_rounds.read_rows("timings.jsonl")
        names = ("clients_seconds", "tuning_seconds", "evaluate_seconds")
        return str(found), sum(row.get(name, 0) for row in timings for name in names)
    return "", 0.0


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    print("ends: the sweep that started this job is gone", flush=True)
    os._exit(1)


def main() -> int:
    """Run the job that the command line names, and write its result whole or not at all."""
    parser = argparse.ArgumentParser(prog="python -m fbl_flower.commands.sweep_job", description="Run one job of a sweep.")
    parser.add_argument("--row", type=Path, required=True)
    parser.add_argument("--size")
    parser.add_argument("--overrides", type=json.loads, default={}, help="settings as JSON")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--sweep", type=int, default=os.getppid(), help="the process that starts the job, and with which it ends"
    )
    options = parser.parse_args()
    threading.Thread(target=_end_with, args=(options.sweep,), daemon=True).start()
    out: Path = options.out
    keep = folder_of_runs(out)
    keep.mkdir(parents=True, exist_ok=True)
    try:
        claim = Claim(keep, patience=_PATIENCE)
    except StateError:
        print(f"left: another process runs this row under seed {options.seed} in {keep}")
        return LEFT
    try:
        row = read_rows([options.row], size=options.size, overrides=options.overrides)[0]
        if out.exists():  # another process ended just now; whether its result is of this row is for the sweep to say
            claim.release()
            return 0
        if problems := unfinished_otherwise(row, options.seed, keep):
            raise ConfigError(problems)
        places = note_identity(row, keep, place_of(row.config))
        result = run_one(row, options.seed, keep=keep) | {"ran_on": ", then ".join(places)}
    except FBLError as error:
        print(f"failed: {error}")
        if not _runs_in(keep):  # nothing that can be gone on with
            shutil.rmtree(keep, ignore_errors=True)
        claim.release()
        return 1
    write_json(out, result)
    remove_run(row, options.seed, keep)
    claim.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
