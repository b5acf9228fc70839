"""The sweep: rows, resuming, and the numbers of the table."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fbl_flower import cli
from fbl_flower.claim import Claim
from fbl_flower.commands import sweep
from fbl_flower.commands.experiments import read_rows
from fbl_flower.commands.sweep import Job, default_out, run_sweep
from fbl_flower.commands.sweep_job import LEFT, folder_of_runs
from fbl_flower.commands.sweep_table import source_of_synthetic, table_lines, write_pictures
from fbl_flower.config import flatten
from fbl_flower.errors import ConfigError
from fbl_flower.reporting.results_pictures import band
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
    assert [row.name for row in rows][:2] == ["01-fedavg", "02-fbl"] and len(rows) == len(list(EXPERIMENTS.glob("[0-9]*.toml")))
    distinct = {json.dumps([row.kind, flatten(row.config)]) for row in rows}
    assert len(distinct) == len(rows) and len({row.title for row in rows}) == len(rows)
    assert all(row.config.num_clients == 10 and row.config.data.name == "mnist5k" for row in rows)
    assert all(row.config.num_server_rounds == 20 and row.config.data.evaluate_on == "test" for row in rows)
    by_name = {row.name[3:]: row.config.balancing for row in rows}
    assert not by_name["weight"].alignment and by_name["weight"].synthetic_weight == 0.5
    assert not by_name["random"].alignment and by_name["random"].sampling == "random" and by_name["fbl"].replay_period == 5


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
    assert (
        f"| 1-a | diffusion | 2 | 55.00 ± 7.07 | 50.00 | 60.00 | 10 | `fbl-flower sweep {rows[0].file} --seeds 0,1` |" in table
    )
    assert "| 1-a | diffusion | 1 of 2 | 90.00 ± 0.00 | 90.00 | 90.00 |  |" in table


def test_a_sweep_of_one_row_adds_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "_start", succeed)
    rows, out = tmp_path / "rows", tmp_path / "out"
    rows.mkdir()
    text = 'title = "{0}"\nkind = "federation"\n[config]\nnum-server-rounds = 2\nnum-clients = {1}\nbalancing.enabled = false\n'
    files = [write_row(rows, f"{n}-row", text.format(f"{n}-row", 10 + n)) for n in (1, 2, 3)]
    write_row(rows, "4-broken", "title =")

    def table_after(*names: Path, seeds: tuple[int, ...], **settings: Any) -> list[list[str]]:
        assert sweep.sweep_command(files=names, seeds=seeds, num_jobs=1, out=out, overrides=settings) == 0
        lines = (out / "table.md").read_text().splitlines()
        return [line.replace(" ", "").split("|")[1:6] for line in lines if line.startswith("|") and "---" not in line]

    head = ["row", "rounds", "finalaccuracy(%)", "seed0"]
    assert table_after(files[2], seeds=(0,)) == [[*head, "seconds"], ["3-row", "2", "50.00", "50.00", "10"]]
    table = table_after(files[0], seeds=(0, 1))
    assert table[0] == [*head, "seed1"]
    assert [line[:5] for line in table[1:]] == [
        ["1-row", "2", "55.00±7.07", "50.00", "60.00"], ["3-row", "2", "50.00(1of2seeds)", "50.00", ""],
    ]  # fmt: skip
    assert "not in the table" not in capsys.readouterr().out
    # with other settings, what is there is of another table
    assert [line[0] for line in table_after(files[1], seeds=(0,), **{"data.alpha": 0.7})] == ["row", "2-row"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not in the table: ")]
    assert told == [
        f"not in the table: {out}/{name}.json: made with other settings (data.alpha: 0.1, now 0.7); delete it, or use another --out"
        for name in ("1-row/0", "1-row/1", "3-row/0")
    ]


def test_a_result_of_other_settings_is_no_seed_of_the_row(tmp_path: Path) -> None:
    """Seed 1 was run before the row's file was changed, and is not asked for: the mean is that of seed 0 alone, 50."""
    out = tmp_path / "out"
    text = 'title = "A"\nkind = "federation"\n[config]\nnum-server-rounds = 2\ntrain.learning-rate = {}\n'
    run_sweep(read_rows([write_row(tmp_path, "1-a", text.format(0.05))]), (0, 1), out=out, num_jobs=1, start=succeed)
    (out / "1-a" / "0.json").unlink()
    rows = read_rows([write_row(tmp_path, "1-a", text.format(0.5))])
    run_sweep(rows, (0,), out=out, num_jobs=1, start=succeed)
    (*_, line) = table_lines(rows[0], (0, 1), out)
    assert line.accuracies == {0: 0.5}


def test_what_another_sweep_runs_is_taken_up_again_if_it_does_not_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another sweep finishes the first row while this one waits, and is killed in the second."""
    rows, out = (
        read_rows([write_row(tmp_path, "1-a"), write_row(tmp_path, "2-b"), write_row(tmp_path, "3-c")]),
        tmp_path / "out",
    )
    folders = [folder_of_runs(out / row.name / "0.json") for row in rows[:2]]
    for folder in folders:
        folder.mkdir(parents=True)
    others = [Claim(folder, patience=0.0) for folder in folders]
    started: list[str] = []

    def start(job: Job) -> Done:
        started.append(job.row.name)
        if job.row.name == "3-c":
            for row, claim in zip(rows, others, strict=False):
                if row.name == "1-a":
                    succeed(Job(row=row, seed=0, result=out / row.name / "0.json"))
                claim.release()
                folder_of_runs(out / row.name / "0.json").rmdir()  # as a job does that ends
        elif not Claim.is_free(folder_of_runs(job.result)):
            return Done(LEFT)
        return succeed(job)

    assert run_sweep(rows, (0,), out=out, num_jobs=1, start=start) == []
    assert sorted(started) == ["1-a", "1-a", "2-b", "2-b", "3-c"]
    printed = capsys.readouterr().out
    assert printed.count("another sweep is running it") == 2 and "failed" not in printed


def test_rows_of_the_same_title_are_refused(tmp_path: Path) -> None:
    for n in (1, 2):
        write_row(tmp_path, f"{n}-row", f'title = "A"\nkind = "federation"\n[config]\ndata.alpha = 0.{n}\n')
    with pytest.raises(ConfigError, match=r"2-row.toml: has the title of .*1-row.toml, 'A'"):
        sweep.sweep_command(files=[tmp_path], seeds=(0,), num_jobs=1, out=tmp_path / "out")


def test_broken_files_and_data_that_is_missing_are_named_together(tmp_path: Path) -> None:
    write_row(tmp_path, "1-broken", "title =")
    write_row(tmp_path, "2-empty", 'title = "2"\nkind = "federation"\n[config]\ndata.name = "folder"\ndata.path = "nowhere"\n')
    with pytest.raises(ConfigError) as caught:
        sweep.sweep_command(files=[tmp_path], seeds=(0,), num_jobs=1, out=tmp_path / "out")
    assert "1-broken.toml" in str(caught.value) and "2-empty.toml" in str(caught.value) and not (tmp_path / "out").exists()


def test_rows_that_a_setting_makes_the_same_are_refused(tmp_path: Path) -> None:
    for n in (1, 2):
        write_row(tmp_path, f"{n}-row", f'title = "{n}"\nkind = "federation"\n[config]\ndata.alpha = 0.{n}\n')
    with pytest.raises(ConfigError, match=r"2-row.toml: asks for the same as .*1-row.toml"):
        sweep.sweep_command(files=[tmp_path], seeds=(0,), num_jobs=1, out=tmp_path / "out", overrides={"data.alpha": 0.3})
    assert not (tmp_path / "out").exists()


def test_a_failed_job_does_not_stop_the_others(tmp_path: Path) -> None:
    rows, out = read_rows([write_row(tmp_path, "1-a"), write_row(tmp_path, "2-b")]), tmp_path / "out"
    failed = run_sweep(rows, (0,), out=out, num_jobs=1, start=lambda job: Done(1) if job.row.name == "1-a" else succeed(job))
    assert [(job.row.name, job.seed) for job in failed] == [("1-a", 0)]
    table = (out / "table.md").read_text()
    assert "| 1-a | diffusion | 2 | not finished |" in table and "| 2-b | diffusion | 2 | 50.00 |" in table


def test_a_result_that_another_sweep_wrote_with_other_settings_is_a_failure_that_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has one round where this sweep's rows have two."""
    rows, out = read_rows([write_row(tmp_path, "1-a"), write_row(tmp_path, "2-b")]), tmp_path / "out"

    def start(job: Job) -> Done:
        done = succeed(job)
        if job.row.name == "1-a":
            result = json.loads(job.result.read_text())
            result["config"]["num-server-rounds"], result["accuracy"] = 1, {"0": 0.1, "1": 0.9}
            job.result.write_text(json.dumps(result))
        return done

    failed = run_sweep(rows, (0,), out=out, num_jobs=1, start=start)
    assert [job.row.name for job in failed] == ["1-a"]
    named = (
        f"1-a, seed 0: failed: {out}/1-a/0.json: made with other settings (num-server-rounds: 1, now 2; no accuracy of round 2)"
    )
    assert named in capsys.readouterr().out
    table = (out / "table.md").read_text()
    assert "| 1-a | diffusion | 2 | not finished |" in table and "| 2-b | diffusion | 2 | 50.00 |" in table


def test_the_table_says_which_results_lack_clients(tmp_path: Path) -> None:
    rows, out = read_rows([write_row(tmp_path, "1-a"), write_row(tmp_path, "2-b")]), tmp_path / "out"

    def start(job: Job) -> Done:
        done = succeed(job)
        if job.row.name == "2-b":
            lacks = {"left_out": {"1": {"0": "late", "3": "late"}, "2": {"0": "late"}}, "not_prepared": {"4": "no disk"}}
            job.result.write_text(json.dumps(json.loads(job.result.read_text()) | lacks))
        return done

    run_sweep(rows[:1], (0,), out=out, num_jobs=1, start=start)
    assert "Not all clients" not in (out / "table.md").read_text()
    run_sweep(rows, (0,), out=out, num_jobs=1, start=start)
    assert (
        (out / "table.md")
        .read_text()
        .endswith(
            "\nNot all clients took part: 2-b, seed 0 (answers missing: 3, in rounds: 2; clients not prepared: 1). "
            "ROW/SEED.json says who and why.\n"
        )
    )


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


def test_a_damaged_result_of_a_row_that_is_not_asked_for_is_left_out(tmp_path: Path) -> None:
    files, out = [write_row(tmp_path, name) for name in ("1-a", "2-b")], tmp_path / "out"
    known = read_rows(files)
    run_sweep(known[1:], (0, 1), out=out, num_jobs=1, start=succeed, known=known)
    (out / "2-b" / "1.json").write_text("<<<<<<< HEAD")
    assert run_sweep(known[:1], (0, 1), out=out, num_jobs=1, start=succeed, known=known) == []
    a, b = (table_lines(row, (0, 1), out)[-1].accuracies for row in known)
    assert (a, b) == ({0: 0.5, 1: 0.6}, {0: 0.5}) and "| 2-b |" in (out / "table.md").read_text()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is closed to the superuser")
def test_a_folder_of_results_that_may_not_be_written_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    assert cli.main(["sweep", str(write_row(tmp_path, "1-a")), "--out", str(out)]) == 2
    assert f"--out: {out} may not be written" in capsys.readouterr().err


def test_table_numbers_by_hand() -> None:
    # 90, 92, 97: mean 93; deviations -3, -1, 4; sd = sqrt((9 + 1 + 16) / 2) = sqrt(13) = 3.6056
    line = TableLine(title="FBL", rounds="20", accuracies={0: 0.9, 1: 0.92, 2: 0.97}, seconds={0: 1, 1: 2, 2: 6}, command="run")
    assert line.mean == pytest.approx(93) and line.deviation == pytest.approx(13**0.5)
    head, _, row = as_markdown([line], (0, 1, 2)).splitlines()
    assert head == "| row | rounds | final accuracy (%) | seed 0 | seed 1 | seed 2 | seconds | command |"
    assert row == "| FBL | 20 | 93.00 ± 3.61 | 90.00 | 92.00 | 97.00 | 3 | `run` |"
    fields = as_csv([line], (0, 1, 2)).splitlines()[1].split(",")
    assert (
        fields[:3] == ["FBL", "20", "3"]
        and float(fields[4]) == pytest.approx(13**0.5)
        and float(fields[8]) == 3
        and fields[-1] == "run"
    )


def test_the_table_says_if_results_were_made_on_different_machines(tmp_path: Path) -> None:
    rows, out = read_rows([write_row(tmp_path, "1-a")]), tmp_path / "out"
    run_sweep(rows, (0, 1), out=out, num_jobs=1, start=succeed)
    said = []
    for second in ({"ran_on": "cpu in fp32"}, {"ran_on": "cuda in bf16"}, {}):  # the last as before it was recorded
        for seed, ran_on in enumerate(({"ran_on": "cpu in fp32"}, second)):
            file = out / "1-a" / f"{seed}.json"
            result = {key: value for key, value in json.loads(file.read_text()).items() if key != "ran_on"}
            file.write_text(json.dumps(result | ran_on))
        run_sweep(rows, (0, 1), out=out, num_jobs=1, start=succeed)
        said.append([line for line in (out / "table.md").read_text().splitlines() if line.startswith("Not all")])
    rest = " Rounding differs, and so may accuracies by as much as seeds do."
    assert said == [
        [],
        [f"Not all results were made alike: cpu in fp32; cuda in bf16.{rest}"],
        [f"Not all results were made alike: cpu in fp32; not recorded.{rest}"],
    ]


def test_the_last_five_rounds_by_hand(tmp_path: Path) -> None:
    """Rounds 2 to 6 of 0.2, 0.3, ... 0.6 (0.1 more under seed 1): means 0.4 and 0.5, so 45 and sd sqrt(25 + 25) = 7.07."""

    def start(job: Job) -> Done:
        done = succeed(job)
        by_round = {"0": 0.9, **{str(r): r / 10 + 0.1 * job.seed for r in range(1, 7)}}
        job.result.write_text(json.dumps(json.loads(job.result.read_text()) | {"accuracy": by_round}))
        return done

    file, out = (
        write_row(tmp_path, "1-a", 'title = "a"\nkind = "federation"\n[config]\nnum-server-rounds = 6\n'),
        tmp_path / "out",
    )
    run_sweep(read_rows([file]), (0, 1), out=out, num_jobs=1, start=start)
    head, _, row = (out / "table.md").read_text().splitlines()[:3]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["mean of the last 5 rounds (%)"] == "45.00 ± 7.07" and cells["final accuracy (%)"] == "65.00 ± 7.07"
    (line,) = csv.DictReader((out / "table.csv").read_text().splitlines())
    assert float(line["mean_last_5_rounds_percent"]) == pytest.approx(45)


def test_one_seed_has_no_spread() -> None:
    line = TableLine(title="x", rounds="", accuracies={0: 0.5}, seconds={0: 4}, command="run")
    assert line.deviation is None and "| x | – | 50.00 | 50.00 | 4 |" in as_markdown([line], (0,))


def test_rounds_and_bytes_to_a_target_by_hand(tmp_path: Path) -> None:
    """Accuracies 0.1, 0.9, 0.5 + 0.1 seed; 100 bytes there and 20 back in round 1, 10 and 2 in round 2.

    A target of 0.55 is reached in round 1 by both seeds, for 120 bytes; in all, 132 are sent. A target of 0.95 is not reached.
    """

    def start(job: Job) -> Done:
        done = succeed(job)
        result = json.loads(job.result.read_text())
        result |= {"bytes_to_clients": {"1": 100, "2": 10}, "bytes_from_clients": {"1": 20, "2": 2}}
        result["accuracy"]["0"] = 0.99  # a warm start's model: no round reached it
        job.result.write_text(json.dumps(result))
        return done

    file, out = write_row(tmp_path, "1-a"), tmp_path / "out"
    run_sweep(read_rows([file], target=0.55), (0, 1), out=out, num_jobs=1, start=start)
    (early, last) = table_lines(read_rows([file], target=0.55)[0], (0, 1), out)
    assert not early.to_target and not early.bytes_sent and not early.seconds
    assert last.to_target == {0: 1, 1: 1} and last.bytes_to_target == {0: 120, 1: 120} and last.bytes_sent == {0: 132, 1: 132}
    table = (out / "table.md").read_text()
    assert "| target (%) | rounds to target | MB to target | MB sent | seconds |" in table
    assert "| 55 | 1.0 | 0.0 | 0.0 | 10 |" in table and "first round with at least that accuracy" in table
    late = table_lines(read_rows([file], target=0.95)[0], (0, 1), out)[-1]
    assert (
        late.to_target == {0: None, 1: None}
        and not late.bytes_to_target
        and "| 95 | not reached |" in as_markdown([late], (0, 1))
    )
    assert ",95.0,0,not reached,,132.0,," in as_csv([late], (0, 1))


def test_a_target_that_some_seeds_reach() -> None:
    line = TableLine(
        title="x", rounds="9", accuracies={0: 0.5, 1: 0.6, 2: 0.7}, seconds={}, command="c",
        target=0.6, to_target={0: None, 1: 4, 2: 7}, bytes_to_target={1: 2_000_000, 2: 5_000_000}, wrong_kept={0: 0.25},
    )  # fmt: skip
    table = as_markdown([line], (0, 1, 2), scored_on="validation")
    assert "final validation accuracy (%)" in table and "wrong labels kept (%)" in table
    assert "| 60 | 5.5 (2 of 3 seeds) | 3.5 (2 of 3 seeds) | 25.0 (1 of 3 seeds) |" in table  # (4 + 7) / 2; (2 + 5) / 2 MB


def test_the_table_says_where_synthetic_images_come_from(tmp_path: Path) -> None:
    texts = {
        "1": "[config]\ngenerator.name = 'public-images'\ngenerator.blur = 1.5\ngenerator.noise = 0.1",
        "2": "[config]\nbalancing.enabled = false",
        "3": "[config]\nbalancing.enabled = false\nwarm-start.enabled = true\ngenerator.trained-on = 'digits'",
        "4": "[config]\nbalancing.filling = false",
    }
    rows = read_rows([write_row(tmp_path, name, f'title = "t"\nkind = "federation"\n{text}\n') for name, text in texts.items()])
    assert [source_of_synthetic(row) for row in rows] == [
        "public-images, blur 1.5 px, noise 0.1",
        "",
        "diffusion, of digits",
        "",
    ]
    central = read_rows(
        [write_row(tmp_path, f"c-{kind}", f'title = "t"\nkind = "{kind}-only"\n') for kind in ("public", "synthetic")]
    )
    assert [source_of_synthetic(row) for row in central] == ["", "diffusion"]


@pytest.mark.parametrize("name", ["gap-mnist5k", "filter-mnist5k"])
def test_the_small_sets_are_valid(name: str) -> None:
    rows = read_rows([EXPERIMENTS.parent / name])
    assert len(rows) == 4 == len({json.dumps(flatten(row.config)) for row in rows})


@pytest.mark.parametrize("results", sorted((ROOT / "results").glob("*")), ids=lambda path: path.name)
def test_the_results_in_the_repository_are_those_of_their_rows(results: Path) -> None:
    """The same settings, and the same generator, as a sweep would ask for now."""
    rows = {row.name: row for row in read_rows([ROOT / "experiments" / results.name])}
    files = list(results.glob("*/*.json"))
    assert files
    for file in files:
        assert rows[file.parent.name].differences(json.loads(file.read_text(encoding="utf-8"))) == []


def test_pictures_of_a_table(tmp_path: Path) -> None:
    rows, out = read_rows([write_row(tmp_path, name) for name in ("1-a", "2-b", "3-c")], target=0.4), tmp_path / "out"
    run_sweep(rows, (0, 1), out=out, num_jobs=1, start=lambda job: Done(1) if job.row.name == "3-c" else succeed(job))
    write_pictures(rows, (0, 1), out)
    for name in ("final.png", "rounds.png"):
        picture = np.asarray(Image.open(out / name).convert("RGB"))
        assert picture.shape[0] >= 300 and picture.shape[1] >= 1000 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    empty = tmp_path / "empty"
    write_pictures(rows, (0,), empty)
    assert not empty.exists()  # nothing has finished, nothing is drawn


def test_the_band_by_hand() -> None:
    # round 2: 50 and 60, mean 55, sd sqrt(50); round 3 is there for one seed only
    rounds, means, spreads = band({0: {0: 0.1, 2: 0.5}, 1: {0: 0.1, 2: 0.6, 3: 0.9}})
    assert rounds == [0, 2] and means == pytest.approx([10, 55]) and spreads == pytest.approx([0, 50**0.5])


def test_results_go_to_a_folder_of_their_set_and_size(tmp_path: Path) -> None:
    (tmp_path / "my-set").mkdir()
    (tmp_path / "my-set" / "_base.toml").write_text("[cpu]\n[paper]\n")
    rows = read_rows([write_row(tmp_path / "my-set", "1-a")])
    assert default_out(rows) == Path("results/my-set-cpu")
    assert default_out([*rows, *read_rows([write_row(tmp_path, "2-b")])]) == Path("results")


def test_a_job_is_started_with_its_size_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_base.toml").write_text("[cpu]\n[paper]\n")
    row = read_rows([write_row(tmp_path, "1-a")], size="paper", overrides={"data.alpha": 0.5})[0]
    commands: list[list[str]] = []
    monkeypatch.setattr("subprocess.Popen", lambda command, **_: commands.append(command))
    sweep._start(Job(row=row, seed=3, result=tmp_path / "out" / "3.json"))
    assert commands[0][3:] == [
        *("--row", str(row.file), "--size", "paper", "--overrides", '{"data.alpha": 0.5}', "--seed", "3"),
        *("--out", str(tmp_path / "out" / "3.json"), "--sweep", str(os.getpid())),
    ]


def test_nothing_runs_while_a_file_is_broken_or_does_not_fit_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a job was started")

    monkeypatch.setattr(sweep, "run_sweep", refuse)
    write_row(tmp_path, "1-fine")
    broken = [write_row(tmp_path, name, "title = ") for name in ("2-broken", "3-broken")]
    with pytest.raises(ConfigError) as caught:
        sweep.sweep_command(files=[tmp_path], seeds=(0,), num_jobs=1, out=tmp_path / "out")
    assert [problem.split(": cannot be read")[0] for problem in caught.value.problems] == [str(file) for file in broken]
    head = 'title = "t"\nkind = "federation"\n[config]\ndata.name = "digits"\n'
    write_row(tmp_path, "2-broken", head + "data.num-test = 5000")
    write_row(tmp_path, "3-broken", head + "data.evaluate-on = 'validation'\ndata.num-validation = 0")
    with pytest.raises(ConfigError) as caught:  # each in a table of its own, since they are scored differently
        sweep.sweep_command(files=[broken[0]], seeds=(0,), num_jobs=1, out=tmp_path / "out")
    assert caught.value.problems[0].startswith(f"{broken[0]}: data.num-test: 5000 test")
    with pytest.raises(ConfigError) as caught:
        sweep.sweep_command(files=[broken[1]], seeds=(0,), num_jobs=1, out=tmp_path / "out")
    assert caught.value.problems[0].startswith(f"{broken[1]}: data.evaluate-on: validation, but")
    assert not (tmp_path / "out").exists()
