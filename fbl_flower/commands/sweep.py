"""`fbl-flower sweep`: run the rows of a results table, several at a time, and write the table.

Each row and seed is a process of its own with one thread, so that rows do not disturb each other's numbers. What has finished
is kept in OUT/ROW/SEED.json and not run again: a sweep that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fbl_flower.commands.experiments import Row, read_rows
from fbl_flower.config import RunConfig, Value, flatten, parse_config
from fbl_flower.errors import ConfigError, FBLError, RunFailed
from fbl_flower.reporting.results_table import TableLine, as_csv, as_markdown

_POLL_S = 0.2


class Process(Protocol):
    """What the sweep needs of a running process."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row under one seed."""

    row: Row
    seed: int
    result: Path

    @property
    def log(self) -> Path:
        return self.result.with_suffix(".log")


def sweep_command(*, files: Sequence[Path], seeds: Sequence[int], num_jobs: int, out: Path) -> int:
    """Check all rows, run what has not finished, write OUT/table.md and OUT/table.csv; return 1 if a job failed, else 0."""
    from fbl_flower.federation.preflight import preflight

    if num_jobs < 1:
        raise ConfigError([f"--jobs: got {num_jobs}; allowed: whole number >= 1"])
    rows = read_rows(files)
    problems = []
    for row in rows:
        try:
            preflight(_what_it_needs(row))
        except FBLError as error:
            found = error.problems if isinstance(error, ConfigError) else [str(error)]
            problems += [f"{row.file}: {problem}" for problem in found]
    if problems:
        raise ConfigError(problems)
    failed = run_sweep(rows, seeds, out=out, num_jobs=num_jobs)
    print((out / "table.md").read_text(encoding="utf-8"))
    for job in failed:
        print(f"fbl-flower: {job.row.name}, seed {job.seed} failed; its log: {job.log}", file=sys.stderr)
    return 1 if failed else 0


def run_sweep(
    rows: Sequence[Row], seeds: Sequence[int], *, out: Path, num_jobs: int, start: Callable[[Job], Process] | None = None
) -> list[Job]:
    """Run every row under every seed that has no result yet, and write the table; return the jobs that failed.

    Args:
        rows: The rows, in the order of the table.
        seeds: All rows run under the first seed, then all under the next: an early stop leaves a whole table.
        out: Folder of results and table.
        num_jobs: Processes at a time.
        start: Starts the process of a job, which is to write `job.result`; tests put their own here.

    Raises:
        ConfigError: A result there was made with other settings, or is damaged.
    """
    jobs = [Job(row=row, seed=seed, result=out / row.name / f"{seed}.json") for seed in seeds for row in rows]
    problems = [problem for job in jobs if job.result.exists() for problem in _stale(job)]
    if problems:
        raise ConfigError(problems)
    waiting = [job for job in jobs if not job.result.exists()]
    failed: list[Job] = []
    running: list[tuple[Job, Process]] = []
    start = start or _start
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                job = waiting.pop(0)
                running.append((job, start(job)))
            ended = [(job, process) for job, process in running if process.poll() is not None]
            running = [entry for entry in running if entry not in ended]
            for job, _ in ended:
                if not job.result.exists():
                    failed.append(job)
                print(f"{job.row.name}, seed {job.seed}: {_outcome(job)}; {len(waiting)} to start", flush=True)
                write_table(rows, seeds, out)
            if running and not ended:
                time.sleep(_POLL_S)
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()
    write_table(rows, seeds, out)
    return failed


def write_table(rows: Sequence[Row], seeds: Sequence[int], out: Path) -> None:
    """Write OUT/table.md and OUT/table.csv from the results that are there."""
    lines = [line for row in rows for line in _lines(row, seeds, out)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(as_markdown(lines, seeds), encoding="utf-8")
    (out / "table.csv").write_text(as_csv(lines, seeds), encoding="utf-8")


def run_one(row: Row, seed: int) -> dict[str, Any]:
    """Run a row under a seed in this process and return its result, as it is stored."""
    settings: dict[str, Value] = row.settings | {"seed": seed, "num-threads": 1, "pictures": False}
    config = parse_config(settings)
    begin = time.perf_counter()
    if row.kind == "federation":
        from fbl_flower.federation.local import run_local

        with tempfile.TemporaryDirectory(
            prefix="fbl-sweep-"
        ) as folder:  # a run directory holds models, too large to keep them all
            outcome = run_local(settings | {"output-dir": folder}, workers=1)
            text = (outcome.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
        metrics = [json.loads(line) for line in text.splitlines()]
        accuracy = {str(entry["round"]): float(entry["accuracy"]) for entry in metrics}
    else:
        from fbl_flower.training.central import run_central

        accuracy = {str(config.num_server_rounds): run_central(config, "public" if row.kind == "public-only" else "synthetic")}
    if str(config.num_server_rounds) not in accuracy:
        raise RunFailed(
            f"{row.file}, seed {seed}: wanted the accuracy of round {config.num_server_rounds}; got {', '.join(accuracy)}"
        )
    seconds = round(time.perf_counter() - begin, 1)
    return {
        "title": row.title,
        "kind": row.kind,
        "seed": seed,
        "seconds": seconds,
        "accuracy": accuracy,
        "config": flatten(config),
    }


def _lines(row: Row, seeds: Sequence[int], out: Path) -> list[TableLine]:
    """Return the table's lines of a row: one for each round to report."""
    results = {seed: json.loads(file.read_text()) for seed in seeds if (file := out / row.name / f"{seed}.json").exists()}
    last = row.report_rounds[-1]
    command = f"fbl-flower sweep {row.file} --seeds {','.join(map(str, seeds))}"
    return [
        TableLine(
            title=row.title,
            rounds=("" if row.kind != "federation" else f"{number}" if number == last else f"{number} of {last}"),
            accuracies={seed: result["accuracy"][str(number)] for seed, result in results.items()},
            seconds={seed: result["seconds"] for seed, result in results.items()} if number == last else {},
            command=command,
        )
        for number in row.report_rounds
    ]


def _what_it_needs(row: Row) -> RunConfig:
    """Return the configuration to check before the start: one that needs a generator exactly if the row does."""
    if row.kind == "federation":
        return row.config
    balancing, warm_start = replace(row.config.balancing, enabled=False), replace(row.config.warm_start, enabled=False)
    if row.kind == "synthetic-only":
        warm_start = replace(warm_start, enabled=True)
    return replace(row.config, balancing=balancing, warm_start=warm_start)


def _start(job: Job) -> Process:
    """Start the process of a job, with its output in the job's log."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "fbl_flower.commands.sweep",
        "--one",
        str(job.row.file),
        "--seed",
        str(job.seed),
        "--out",
        str(job.result),
    ]
    with job.log.open("w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        )


def _stale(job: Job) -> list[str]:
    """Say why a result that is there cannot stand for its job."""
    try:
        differences = job.row.differences(json.loads(job.result.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        return [f"{job.result}: damaged ({error}); delete it, and it is run again"]
    if not differences:
        return []
    return [f"{job.result}: made with other settings ({'; '.join(differences)}); delete it, or use another --out"]


def _outcome(job: Job) -> str:
    if not job.result.exists():
        return f"failed, see {job.log}"
    result = json.loads(job.result.read_text(encoding="utf-8"))
    return f"{100 * result['accuracy'][str(job.row.report_rounds[-1])]:.2f} % in {result['seconds']:.0f} s"


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fbl_flower.commands.sweep", description="Run one job of a sweep.")
    parser.add_argument("--one", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        result = run_one(read_rows([options.one])[0], options.seed)
    except FBLError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    whole = options.out.with_suffix(".part")
    whole.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(whole, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
