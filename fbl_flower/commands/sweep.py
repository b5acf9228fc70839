"""`fbl-flower sweep`: run the rows of a results table, several at a time, and write the table.

Each row and seed is a process of its own with one thread, so that rows do not disturb each other's numbers. What has finished
is kept in OUT/ROW/SEED.json and not run again: a sweep that was killed goes on where it stopped, a job at its last checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from fbl_flower.claim import Claim
from fbl_flower.commands.experiments import Row, check_rows, read_beside, twins
from fbl_flower.commands.job_memory import MemoryGate
from fbl_flower.commands.sweep_job import LEFT, folder_of_runs, unfinished_otherwise
from fbl_flower.commands.sweep_table import read_result, results_of, unusable, unusable_of, write_pictures, write_table
from fbl_flower.config import RunConfig, Value
from fbl_flower.errors import ConfigError, FBLError

_POLL_S = 0.2
_WRITTEN = ("table.md", "table.csv", "final.png", "rounds.png")


class Process(Protocol):
    """What the sweep needs of a running process."""

    @property
    def pid(self) -> int: ...

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


def sweep_command(
    *,
    files: Sequence[Path],
    seeds: Sequence[int],
    num_jobs: int,
    out: Path | None = None,
    size: str | None = None,
    overrides: Mapping[str, Value] | None = None,
    target: float | None = None,
    note: str = "",
) -> int:
    """Check all rows, run what has not finished, write tables and pictures; return 1 if a job failed, else 0.

    Args:
        files: Rows, and folders of rows.
        seeds: Each row runs under each of them.
        num_jobs: Processes at a time, as far as memory allows.
        out: Folder of results; None: `results/FOLDER-SIZE`, after the folder and size of the rows.
        size, overrides, target: As `read_rows`.
        note: Stands above the table, before the rows' own notes.

    Raises:
        ConfigError: Lists what is wrong in any of the files, or does not fit the data; nothing has been run then.
    """
    from fbl_flower.data.datasets import forget_parts
    from fbl_flower.federation.preflight import preflight

    if num_jobs < 1:
        raise ConfigError([f"--jobs: got {num_jobs}; allowed: whole number >= 1"])
    rows, problems = check_rows(files, size=size, overrides=overrides, target=target)
    rows = [replace(row, notes=(note, *row.notes)) for row in rows] if note else rows
    problems += twins(rows)
    for row in rows:
        try:
            preflight(_what_it_needs(row))
        except FBLError as error:
            found = error.problems if isinstance(error, ConfigError) else [str(error)]
            problems += [f"{row.file}: {problem}" for problem in found]
    if problems:
        raise ConfigError(problems)
    forget_parts()  # the jobs read the data themselves, and need the memory
    out = out or default_out(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"--out: {out} cannot be made or is no folder ({error.strerror}); choose another"]) from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise ConfigError([f"--out: {out} may not be written; mend its permissions, or choose another"])
    known = read_beside(rows, size=size, overrides=overrides, target=target)
    known = [replace(row, notes=(note, *row.notes)) for row in known] if note else known
    failed = run_sweep(rows, seeds, out=out, num_jobs=num_jobs, known=known)
    write_pictures(*whole_table(rows, seeds, out=out, known=known), out)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"{out}: {', '.join(name for name in _WRITTEN if (out / name).exists())}")
    for row in {row.name: row for row in (*known, *rows)}.values():
        for problem in unusable_of(row, out):
            print(f"not in the table: {problem}")
    for job in failed:
        print(f"fbl-flower: {job.row.name}, seed {job.seed} failed; its log: {job.log}", file=sys.stderr)
    return 1 if failed else 0


def default_out(rows: Sequence[Row]) -> Path:
    """Return `results/FOLDER`, or `results/FOLDER-SIZE`, for rows of one folder and size; else `results`."""
    names = {row.file.resolve().parent.name + (f"-{row.size}" if row.size else "") for row in rows}
    return Path("results") / names.pop() if len(names) == 1 else Path("results")


def run_sweep(
    rows: Sequence[Row],
    seeds: Sequence[int],
    *,
    out: Path,
    num_jobs: int,
    start: Callable[[Job], Process] | None = None,
    known: Sequence[Row] = (),
) -> list[Job]:
    """Run every row under every seed that has no result yet, and write the table; return the jobs that failed.

    Args:
        rows: The rows, in the order of the table.
        seeds: All rows run under the first seed, then all under the next: an early stop leaves a whole table.
        out: Folder of results and table.
        num_jobs: Processes at a time, as far as memory allows.
        start: Starts the process of a job, which is to write `job.result`; tests put their own here.
        known: As `whole_table` has them.

    Raises:
        ConfigError: A result there was made, or a run begun, with other settings; or a result is damaged.

    A job that another sweep is running is left to it, and taken up at the end if that sweep did not finish it.
    """
    jobs = [Job(row=row, seed=seed, result=out / row.name / f"{seed}.json") for seed in seeds for row in rows]
    problems = [
        problem for job in jobs for problem in (unusable(job.row, job.result) if job.result.exists() else _begun_otherwise(job))
    ]
    if problems:
        raise ConfigError(problems)
    waiting = [job for job in jobs if not job.result.exists()]
    failed: list[Job] = []
    left: list[Job] = []
    running: list[tuple[Job, Process]] = []
    start = start or _start
    gate = MemoryGate([peak for job in jobs if job.result.exists() and (peak := read_result(job.result).get("peak_bytes"))])
    try:
        while waiting or running or left:
            if left and not waiting and not running:
                waiting = [job for job in left if job.result.exists() or Claim.is_free(folder_of_runs(job.result))]
                left = [job for job in left if job not in waiting]
            while waiting and len(running) < num_jobs and gate.may_start([process.pid for _, process in running]):
                job = waiting.pop(0)
                running.append((job, start(job)))
            ended = [(job, process) for job, process in running if process.poll() is not None]
            running = [entry for entry in running if entry not in ended]
            for job, process in ended:
                if process.poll() == LEFT and not job.result.exists():
                    print(f"{job.row.name}, seed {job.seed}: another sweep is running it", flush=True)
                    left.append(job)
                    continue
                failure = _failure(job)
                if failure:
                    failed.append(job)
                elif peak := read_result(job.result).get("peak_bytes"):
                    gate.learn(peak)
                print(f"{job.row.name}, seed {job.seed}: {failure or _score(job)}; {len(waiting)} to start", flush=True)
                write_table(*whole_table(rows, seeds, out=out, known=known), out)
            if (running or left) and not ended:
                time.sleep(_POLL_S)
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()
    write_table(*whole_table(rows, seeds, out=out, known=known), out)
    return failed


def whole_table(
    rows: Sequence[Row], seeds: Sequence[int], *, out: Path, known: Sequence[Row]
) -> tuple[list[Row], tuple[int, ...]]:
    """Return the rows and seeds of the table in `out`: those asked for, and all that have results there already.

    So a sweep of one row adds to the table and does not replace it.

    Args:
        rows, seeds: Those asked for.
        out: Folder of results.
        known: The rows of the same folders, in their order; those whose results there have other settings are left out.
    """
    asked = {row.name for row in rows}
    found = {row.name: list(results_of(row, out)) for row in (*known, *rows)}
    others = [
        row for row in known if row.name not in asked and found[row.name] and row.config.data.evaluate_on == _scored(rows)
    ]
    order = {row.name: place for place, row in enumerate(known)}
    shown = sorted([*rows, *others], key=lambda row: order.get(row.name, len(order)))
    return shown, tuple(sorted({*seeds, *(seed for row in shown for seed in found[row.name])}))


def _scored(rows: Sequence[Row]) -> str:
    return rows[0].config.data.evaluate_on


def _what_it_needs(row: Row) -> RunConfig:
    """Return the configuration to check before the start: one that needs a generator exactly if the row does."""
    if row.kind == "federation":
        return row.config
    balancing, warm_start = replace(row.config.balancing, enabled=False), replace(row.config.warm_start, enabled=False)
    if row.kind == "synthetic-only":
        warm_start = replace(warm_start, enabled=True, images="synthetic")
    tuning = replace(row.config.server_tuning, part="none")
    return replace(row.config, balancing=balancing, warm_start=warm_start, server_tuning=tuning)


def _start(job: Job) -> Process:
    """Start the process of a job, with its output in the job's log."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "fbl_flower.commands.sweep_job",
        "--row",
        str(job.row.file),
        *(["--size", job.row.size] if job.row.size else []),
        "--overrides",
        json.dumps(job.row.overrides),
        "--seed",
        str(job.seed),
        "--out",
        str(job.result),
        "--sweep",  # by number: it may end before the job can ask who started it
        str(os.getpid()),
    ]
    with job.log.open("a") as log:  # a job that was killed goes on: its log too
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        )


def _begun_otherwise(job: Job) -> list[str]:
    """Say why a run that was killed cannot be gone on with for its job."""
    return unfinished_otherwise(job.row, job.seed, folder_of_runs(job.result))


def _failure(job: Job) -> str:
    """Say why a job that has ended failed; empty if its result can stand for its row."""
    if not job.result.exists():
        return f"failed, see {job.log}"
    problems = unusable(job.row, job.result)  # such as of another sweep, with other settings
    return f"failed: {problems[0]}" if problems else ""


def _score(job: Job) -> str:
    result = read_result(job.result)
    return f"{100 * result['accuracy'][str(job.row.report_rounds[-1])]:.2f} % in {result['seconds']:.0f} s"
