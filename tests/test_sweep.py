"""The sweep: rows, resuming, and the numbers of the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fbl_flower.commands.experiments import read_rows
from fbl_flower.commands.sweep import Job, run_sweep
from fbl_flower.config import flatten
from fbl_flower.errors import ConfigError
from fbl_flower.reporting.results_table import TableLine, as_csv, as_markdown

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments" / "mnist5k"


class Done:
    """A process that has ended."""

    pid = 2**22 + 1  # above the largest of Linux: its memory cannot be measured

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        pass

    def wait(self) -> int:
        return self.code


class Endless(Done):
    """A process that does not end by itself."""

    terminated = False

    def poll(self) -> None:  # type: ignore[override]
        return None

    def terminate(self) -> None:
        self.terminated = True


def write_row(folder: Path, name: str, text: str = "") -> Path:
    file = folder / f"{name}.toml"
    file.write_text(text or f'title = "{name}"\nkind = "federation"\nreport-rounds = [1]\n[config]\nnum-server-rounds = 2\n')
    return file


def succeed(job: Job) -> Done:
    """Write a result as a finished job does: the final accuracy is 0.5 + 0.1 * seed, that of round 1 higher."""
    job.result.parent.mkdir(parents=True, exist_ok=True)
    accuracy = {"0": 0.1, "1": 0.9, "2": 0.5 + 0.1 * job.seed}
    result = {"kind": job.row.kind, "seconds": 10 + job.seed, "accuracy": accuracy, "config": flatten(job.row.config)}
    job.result.write_text(json.dumps(result))
    return Done(0)


def test_the_experiments_are_valid_and_none_is_written_twice() -> None:
    rows = read_rows([EXPERIMENTS])
    assert [row.name for row in rows][:4] == ["01-fedavg", "02-fbl", "11-random", "12-loss"] and len(rows) == 18
    distinct = {json.dumps([row.kind, flatten(row.config)]) for row in rows}
    assert len(distinct) == len(rows) and len({row.title for row in rows}) == len(rows)
    assert all(row.config.num_clients == 10 and row.config.data.name == "mnist5k" for row in rows)
    assert all(row.config.num_server_rounds == (60 if row.name.startswith("0") else 20) for row in rows)
    by_name = {row.name[3:]: row.config.balancing for row in rows}
    assert not by_name["align"].drop and by_name["align-drop"].drop == 0.5 and not by_name["align-drop"].replay_period
    assert not by_name["loss"].alignment and by_name["random"].sampling == "random" and by_name["fbl"].replay_period == 5


def test_all_broken_rows_are_reported_and_nothing_runs(tmp_path: Path) -> None:
    write_row(tmp_path, "1-no-toml", "title =")
    write_row(tmp_path, "2-wrong", 'kind = "fed"\nextra = 1\nreport-rounds = [99]\n[config]\nseed = 1\nalpha = 2\n')
    write_row(tmp_path, "3-central", 'title = "x"\nkind = "public-only"\nreport-rounds = [1]\n')
    with pytest.raises(ConfigError) as caught:
        read_rows([tmp_path, tmp_path / "4-nowhere.toml"])
    text = "\n".join(caught.value.problems)
    for part in (
        "1-no-toml.toml: cannot be read as TOML",
        "2-wrong.toml: extra: unknown key",
        "2-wrong.toml: title: got None; wanted text",
        "2-wrong.toml: kind: got 'fed'; allowed: federation | public-only | synthetic-only",
        "2-wrong.toml: seed: the sweep itself sets it",
        "2-wrong.toml: alpha: unknown key",
        "2-wrong.toml: report-rounds: got [99]",
        "3-central.toml: report-rounds: got [1]; only",
        "4-nowhere.toml: cannot be read",
    ):
        assert part in text


def test_rows_of_the_same_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="would be mixed up"):
        read_rows([write_row(tmp_path, "1"), write_row(tmp_path / "b", "1")])


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rows, out = read_rows([write_row(tmp_path, "1-a"), write_row(tmp_path, "2-b")]), tmp_path / "out"
    started: list[str] = []

    def killed_at_the_third(job: Job) -> Done:
        if len(started) == 2:
            raise KeyboardInterrupt
        started.append(f"{job.row.name}/{job.seed}")
        return succeed(job)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(rows, (0, 1), out=out, num_jobs=1, start=killed_at_the_third)
    assert started == ["1-a/0", "2-b/0"]  # every row under the first seed comes first
    assert "(1 of 2 seeds)" in (out / "table.md").read_text()
    later: list[str] = []

    def start(job: Job) -> Done:
        later.append(f"{job.row.name}/{job.seed}")
        return succeed(job)

    assert run_sweep(rows, (0, 1), out=out, num_jobs=2, start=start) == []
    assert later == ["1-a/1", "2-b/1"]
    assert run_sweep(rows, (0, 1), out=out, num_jobs=2, start=start) == [] and len(later) == 2
    # final: 50 and 60 percent, mean 55, sd = sqrt(25 + 25) = 7.07; the higher accuracy of round 1 is a line of its own
    table = (out / "table.md").read_text()
    assert f"| 1-a | diffusion | 2 | 55.00 ± 7.07 | 50.00 | 60.00 | 10 | `fbl-flower sweep {rows[0].file} --seeds 0,1` |" in table
    assert "| 1-a | diffusion | 1 of 2 | 90.00 ± 0.00 | 90.00 | 90.00 |  |" in table


def test_a_failed_job_does_not_stop_the_others(tmp_path: Path) -> None:
    rows, out = read_rows([write_row(tmp_path, "1-a"), write_row(tmp_path, "2-b")]), tmp_path / "out"
    failed = run_sweep(rows, (0,), out=out, num_jobs=1, start=lambda job: Done(1) if job.row.name == "1-a" else succeed(job))
    assert [(job.row.name, job.seed) for job in failed] == [("1-a", 0)]
    table = (out / "table.md").read_text()
    assert "| 1-a | diffusion | 2 | not finished |" in table and "| 2-b | diffusion | 2 | 50.00 |" in table


def test_an_interrupt_ends_the_processes(tmp_path: Path) -> None:
    rows = read_rows([write_row(tmp_path, "1-a"), write_row(tmp_path, "2-b")])
    running: list[Endless] = []

    def start(job: Job) -> Endless:
        if running:
            raise KeyboardInterrupt
        running.append(Endless(0))
        return running[0]

    with pytest.raises(KeyboardInterrupt):
        run_sweep(rows, (0,), out=tmp_path / "out", num_jobs=2, start=start)
    assert running[0].terminated


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    file, out = write_row(tmp_path, "1-a"), tmp_path / "out"
    run_sweep(read_rows([file]), (0,), out=out, num_jobs=1, start=succeed)
    write_row(tmp_path, "1-a", 'title = "new title"\nkind = "federation"\n[config]\nnum-server-rounds = 2\n')
    run_sweep(read_rows([file]), (0,), out=out, num_jobs=1, start=succeed)  # a title is no setting
    write_row(tmp_path, "1-a", 'title = "a"\nkind = "federation"\n[config]\nnum-server-rounds = 2\ndata.alpha = 0.3\n')
    with pytest.raises(ConfigError, match=r"0.json: made with other settings \(data.alpha: 0.1, now 0.3\)"):
        run_sweep(read_rows([file]), (0,), out=out, num_jobs=1, start=succeed)
    (out / "1-a" / "0.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        run_sweep(read_rows([file]), (0,), out=out, num_jobs=1, start=succeed)


def test_table_numbers_by_hand() -> None:
    # 90, 92, 97: mean 93; deviations -3, -1, 4; sd = sqrt((9 + 1 + 16) / 2) = sqrt(13) = 3.6056
    line = TableLine(title="FBL", rounds="20", accuracies={0: 0.9, 1: 0.92, 2: 0.97}, seconds={0: 1, 1: 2, 2: 6}, command="run")
    assert line.mean == pytest.approx(93) and line.deviation == pytest.approx(13**0.5)
    head, _, row = as_markdown([line], (0, 1, 2)).splitlines()
    assert head == "| row | rounds | final accuracy (%) | seed 0 | seed 1 | seed 2 | seconds | command |"
    assert row == "| FBL | 20 | 93.00 ± 3.61 | 90.00 | 92.00 | 97.00 | 3 | `run` |"
    fields = as_csv([line], (0, 1, 2)).splitlines()[1].split(",")
    assert fields[:3] == ["FBL", "20", "3"] and float(fields[4]) == pytest.approx(13**0.5) and float(fields[8]) == 3 and fields[-1] == "run"


def test_one_seed_has_no_spread() -> None:
    line = TableLine(title="x", rounds="", accuracies={0: 0.5}, seconds={0: 4}, command="run")
    assert line.deviation is None and "| x | – | 50.00 | 50.00 | 4 |" in as_markdown([line], (0,))
