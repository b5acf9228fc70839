"""One job of a sweep: a row under a seed, in a process of its own.

A federation's run directory lies in `runs/SEED` beside the result until that is written. A job that was killed goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fbl_flower.commands.experiments import Row, identity, read_rows
from fbl_flower.commands.job_memory import memory_of
from fbl_flower.commands.json_file import write_json
from fbl_flower.config import RunConfig, Value, parse_config
from fbl_flower.device import pick_device, precision_on
from fbl_flower.errors import ConfigError, FBLError, RunFailed, StateError

_BYTES = ("bytes_to_clients", "bytes_from_clients")


def run_one(row: Row, seed: int, *, keep: Path) -> dict[str, Any]:
    """Run a row under a seed in this process and return its result, as it is stored.

    Args:
        row: The row.
        seed: Of the run.
        keep: Folder for the run directory; a run that was killed there goes on from its checkpoint.
    """
    settings: dict[str, Value] = row.settings | {"seed": seed, "num-threads": 1, "pictures": False, "output-dir": str(keep)}
    config = parse_config(settings)
    begin = time.perf_counter()
    measured: dict[str, Any] = {}
    earlier = 0.0
    if row.kind == "federation":
        measured, earlier = _run_federation(config)
    else:
        from fbl_flower.training.central import run_central

        accuracy = run_central(config, "public" if row.kind == "public-only" else "synthetic")
        measured["accuracy"] = {str(config.num_server_rounds): accuracy}
    if str(config.num_server_rounds) not in measured["accuracy"]:
        rounds = ", ".join(measured["accuracy"])
        raise RunFailed(f"{row.file}, seed {seed}: wanted the accuracy of round {config.num_server_rounds}; got {rounds}")
    memory, device = memory_of(os.getpid()), pick_device(config)
    return {
        "title": row.title,
        "kind": row.kind,
        "size": row.size,
        "seed": seed,
        "seconds": round(earlier + time.perf_counter() - begin, 1),
        "peak_bytes": memory[1] if memory else None,
        "ran_on": f"{device.type} in {precision_on(device, config.train.precision)}",
        **measured,
        "config": identity(config, row.kind) | {"seed": seed},
    }


def remove_run(row: Row, seed: int, keep: Path) -> None:
    """Remove what a finished job's federation left: its run directories, and what its clients remember of them."""
    from fbl_flower.federation.client import state_folder

    for run in keep.iterdir() if keep.is_dir() else ():
        shutil.rmtree(state_folder(row.config.state_dir, run.name, 0).parent, ignore_errors=True)
    shutil.rmtree(keep, ignore_errors=True)
    with contextlib.suppress(OSError):  # other seeds' runs are there
        keep.parent.rmdir()


def _run_federation(config: RunConfig) -> tuple[dict[str, Any], float]:
    """Run a federation, or go on with one; return what the result keeps, and the seconds that the earlier part took."""
    from fbl_flower.commands.wrong_labels import wrong_label_shares
    from fbl_flower.federation.local import run_local

    path, earlier = _earlier_part(config)
    outcome = run_local(replace(config, resume=path), workers=1)
    text = (outcome.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in text.splitlines()]
    measured: dict[str, Any] = {"accuracy": {str(entry["round"]): float(entry["accuracy"]) for entry in metrics}}
    for name in _BYTES:
        if sent := {str(entry["round"]): int(entry[name]) for entry in metrics if entry.get(name) is not None}:
            measured[name] = sent
    if shares := wrong_label_shares(config, outcome.run_dir.name):
        measured["wrong_labels"] = shares
    return measured, earlier


def _earlier_part(config: RunConfig) -> tuple[str, float]:
    """Return the directory of a run that was killed and can go on, and the seconds up to its checkpoint; else "" and 0."""
    from fbl_flower.reporting.rundir import RunDirectory

    folder = Path(config.output_dir)
    for found in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
        try:
            run, point = RunDirectory.reopen(replace(config, resume=str(found)))
        except (ConfigError, StateError) as error:
            print(f"starts afresh, not from {found}: {error}", flush=True)
            shutil.rmtree(found, ignore_errors=True)
            continue
        print(f"goes on after round {point.server_round} of {found}", flush=True)
        timings = run.read_rows("timings.jsonl")
        return str(found), sum(row["clients_seconds"] + row["evaluate_seconds"] for row in timings)
    return "", 0.0


def main() -> int:
    """Run the job that the command line names, and write its result whole or not at all."""
    parser = argparse.ArgumentParser(prog="python -m fbl_flower.commands.sweep_job", description="Run one job of a sweep.")
    parser.add_argument("--row", type=Path, required=True)
    parser.add_argument("--size")
    parser.add_argument("--overrides", type=json.loads, default={}, help="settings as JSON")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out: Path = options.out
    keep = out.parent / "runs" / str(options.seed)
    try:
        row = read_rows([options.row], size=options.size, overrides=options.overrides)[0]
        result = run_one(row, options.seed, keep=keep)
    except FBLError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    write_json(out, result)
    remove_run(row, options.seed, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
