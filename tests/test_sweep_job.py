"""One job of a sweep: what its result holds, how it goes on after a kill, and when memory holds it back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import quick

from fbl_flower.claim import Claim
from fbl_flower.commands import sweep, sweep_job
from fbl_flower.commands.experiments import Row, read_rows
from fbl_flower.commands.job_memory import MemoryGate, memory_of
from fbl_flower.commands.sweep_job import folder_of_runs, note_identity, remove_run, run_one, unfinished_otherwise
from fbl_flower.config import Value, flatten, to_toml
from fbl_flower.errors import ConfigError, DataError, RunFailed
from fbl_flower.federation import client
from fbl_flower.federation.local import run_local
from fbl_flower.training.round import run_local_round

SETS = sorted((Path(__file__).parents[1] / "experiments").glob("0*"))
GIVEN = ("pictures", "output-dir")


def make_row(tmp_path: Path, kind: str = "federation", **overrides: Value) -> Row:
    settings = {key: value for key, value in quick(tmp_path, **overrides).items() if key not in GIVEN}
    file = tmp_path / "row.toml"
    file.write_text(f'title = "t"\nkind = "{kind}"\n[config]\n{to_toml(settings)}')
    return read_rows([file])[0]


def test_a_killed_job_goes_on_from_its_checkpoint_with_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, keep = make_row(tmp_path), tmp_path / "keep"
    whole = run_one(row, 0, keep=tmp_path / "other")
    half = row.settings | {"seed": 0, "num-threads": 1, "pictures": False, "output-dir": str(keep), "num-server-rounds": 2}
    run_dir = run_local(half).run_dir  # as a kill after the checkpoint of round 2 leaves it
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "accu')
    timings = [json.loads(line) for line in (run_dir / "timings.jsonl").read_text().splitlines()]
    timings[1]["clients_seconds"] += 1000  # the earlier part's time counts
    (run_dir / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    capsys.readouterr()
    resumed = run_one(row, 0, keep=keep)
    assert f"goes on after round 2 of {run_dir}" in capsys.readouterr().out
    assert [path.name for path in keep.iterdir()] == [run_dir.name]
    assert resumed["accuracy"] == whole["accuracy"] and list(whole["accuracy"]) == ["0", "1", "2", "3"]
    assert resumed["seconds"] > 1000 > whole["seconds"]
    assert resumed["config"] == whole["config"] and resumed["config"]["seed"] == 0
    assert (tmp_path / "state" / "clients" / run_dir.name).is_dir()
    remove_run(row, 0, keep)
    assert tmp_path.is_dir() and not keep.exists() and not (tmp_path / "state" / "clients" / run_dir.name).exists()


def test_a_run_without_a_checkpoint_is_begun_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, keep = make_row(tmp_path, num_server_rounds=1), tmp_path / "keep"
    (keep / "0-killed-before-its-first-checkpoint").mkdir(parents=True)
    assert unfinished_otherwise(row, 0, keep) == []
    run_one(row, 0, keep=keep)
    assert capsys.readouterr().out.count("starts afresh") == 1 and len(list(keep.iterdir())) == 1


def test_an_unfinished_run_with_other_settings_is_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, out = make_row(tmp_path, num_server_rounds=1), tmp_path / "out"
    keep = out / row.name / "runs" / "0"
    other = row.settings | {"seed": 0, "num-threads": 1, "pictures": False, "output-dir": str(keep)}
    run_dir = run_local(other | {"train.epochs": 2, "num-server-rounds": 2}).run_dir
    named = f"{run_dir}: begun with other settings (train.epochs: 2, now 1; num-server-rounds: 2, now 1); delete it, or use another --out"
    with pytest.raises(ConfigError) as caught:
        sweep.run_sweep([row], (0,), out=out, num_jobs=1)
    assert caught.value.problems == [named]
    assert job(monkeypatch, row, 0, out / row.name / "0.json") == 1 and (run_dir / "checkpoint.safetensors").is_file()


def test_an_unfinished_run_with_another_generator_is_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "mine" / "recipe.json"
    recipe.parent.mkdir()
    recipe.write_text("first")
    row, out = make_row(tmp_path, generator__path=str(recipe.parent)), tmp_path / "out" / "row" / "0.json"
    keep = folder_of_runs(out)

    def killed(row: Row, seed: int, *, keep: Path) -> None:
        (keep / "a-run").mkdir()
        raise RunFailed("killed")

    monkeypatch.setattr(sweep_job, "run_one", killed)
    assert job(monkeypatch, row, 0, out) == 1
    (keep / "a-run" / "config.toml").write_text(to_toml(flatten(sweep_job._config(row, 0, keep))))
    assert unfinished_otherwise(row, 0, keep) == []
    before = row.identity["generator.path"]
    recipe.write_text("retrained")
    again = read_rows([row.file])[0]
    (problem,) = unfinished_otherwise(again, 0, keep)
    assert problem.startswith(f"{keep / 'a-run'}: begun with other settings (generator.path: {before!r}, now 'mine@")
    assert job(monkeypatch, again, 0, out) == 1 and (keep / "a-run").is_dir() and not out.exists()


def job(monkeypatch: pytest.MonkeyPatch, row: Row, seed: int, out: Path, *more: str) -> int:
    """Run a job in this process, as `python -m fbl_flower.commands.sweep_job` does."""
    monkeypatch.setattr("sys.argv", ["sweep_job", "--row", str(row.file), "--seed", str(seed), "--out", str(out), *more])
    return sweep_job.main()


def test_a_job_that_another_process_runs_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row, out = make_row(tmp_path, "public-only", num_server_rounds=1), tmp_path / "out" / "row" / "0.json"
    keep = out.parent / "runs" / "0"
    (keep / "a-run").mkdir(parents=True)
    monkeypatch.setattr(sweep_job, "_PATIENCE", 0.0)
    claim = Claim(keep, patience=0.0)
    assert job(monkeypatch, row, 0, out) == sweep_job.LEFT and not out.exists() and (keep / "a-run").is_dir()
    assert f"left: another process runs this row under seed 0 in {keep}" in capsys.readouterr().out
    claim.release()
    assert job(monkeypatch, row, 0, out) == 0 and out.exists()
    written = out.read_bytes()
    assert job(monkeypatch, row, 0, out) == 0 and out.read_bytes() == written  # another process ended just before


@pytest.mark.skipif(sys.platform == "win32", reason="processes there do not change their parent")
def test_a_job_ends_when_its_sweep_was_killed(tmp_path: Path) -> None:
    """A process of its own starts the job and is killed; the job's lock is then free within seconds."""
    row, out = make_row(tmp_path, num_server_rounds=100_000), tmp_path / "out" / "0.json"
    command = [sys.executable, "-m", "fbl_flower.commands.sweep_job", "--row", str(row.file), "--seed", "0", "--out", str(out)]
    text = f"import subprocess, time; job = subprocess.Popen({command!r}); print(job.pid, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while not list((out.parent / "runs" / "0").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        parent.kill()
        while memory_of(pid) is not None and time.monotonic() < deadline:
            time.sleep(0.1)
    Claim(out.parent / "runs" / "0", patience=5.0).release()


@pytest.mark.slow
def test_a_job_ends_whose_sweep_is_gone_before_it_can_ask(tmp_path: Path) -> None:
    row, out = make_row(tmp_path, num_server_rounds=100_000), tmp_path / "out" / "0.json"
    with subprocess.Popen([sys.executable, "-c", ""]) as sweep_process:
        pass
    command = [sys.executable, "-m", "fbl_flower.commands.sweep_job", "--row", str(row.file), "--seed", "0", "--out", str(out)]
    job = subprocess.run(
        [*command, "--sweep", str(sweep_process.pid)], capture_output=True, text=True, timeout=120, check=False
    )
    assert job.returncode == 1 and "the sweep that started this job is gone" in job.stdout


def test_a_result_says_which_clients_were_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_for_one(arrays: Any, data: Any, *rest: Any, **more: Any) -> Any:
        if data.client == 2:
            raise DataError("gone", public="its disk is gone")
        return run_local_round(arrays, data, *rest, **more)

    monkeypatch.setattr(client, "run_local_round", fails_for_one)
    row = make_row(tmp_path, num_server_rounds=1, fraction_train=1.0)
    result = run_one(row, 0, keep=tmp_path / "keep")
    (reason,) = result["left_out"].pop("1").values()
    assert reason.startswith("its disk is gone") and result["left_out"] == {} and "not_prepared" not in result


def test_a_job_that_goes_on_elsewhere_names_both_places(tmp_path: Path) -> None:
    row, keep = make_row(tmp_path), tmp_path / "keep"
    keep.mkdir()
    assert note_identity(row, keep, "cpu in fp32") == ["cpu in fp32"]
    assert note_identity(row, keep, "cpu in bf16") == ["cpu in bf16"]  # nothing had begun there
    (keep / "a-run").mkdir()
    assert note_identity(row, keep, "cpu in bf16") == ["cpu in bf16"]
    assert note_identity(row, keep, "cuda in bf16") == ["cpu in bf16", "cuda in bf16"]
    noted = json.loads((keep / "identity.json").read_text())
    assert noted["ran_on"] == ["cpu in bf16", "cuda in bf16"] and noted["config"] == row.identity
    assert unfinished_otherwise(row, 0, keep) == []


def test_the_job_writes_its_result_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, out = make_row(tmp_path, "public-only", num_server_rounds=1), tmp_path / "out" / "row" / "4.json"
    out.parent.mkdir(parents=True)
    assert job(monkeypatch, row, 4, out, "--overrides", '{"train.epochs": 2}') == 0
    result = json.loads(out.read_text())
    assert list(result["accuracy"]) == ["1"] and 0 <= result["accuracy"]["1"] <= 1
    assert result["config"]["train.epochs"] == 2 and result["config"]["seed"] == 4 and "state-dir" not in result["config"]
    assert result["ran_on"] in ("cpu in fp32", "cpu in bf16", "cuda in bf16", "cuda in fp32")
    assert list(out.parent.iterdir()) == [out]


def test_wrong_labels_among_the_kept_images(tmp_path: Path) -> None:
    """300 images, 60 of them wrong. Without sampling, all are kept; with it, kept and set aside make up all again."""
    settings: dict[str, Value] = {"data__wrong_labels": 0.2, "fraction_train": 1.0, "num_server_rounds": 1}
    shares = run_one(make_row(tmp_path, balancing__sampling="none", **settings), 0, keep=tmp_path / "1")["wrong_labels"]
    assert shares == {"kept": pytest.approx(0.2), "held": pytest.approx(0.2)}
    shares = run_one(make_row(tmp_path, **settings), 0, keep=tmp_path / "2")["wrong_labels"]
    assert min(shares["kept"], shares["set-aside"]) < 0.2 < max(shares["kept"], shares["set-aside"])
    num_kept = 300 * (0.2 - shares["set-aside"]) / (shares["kept"] - shares["set-aside"])  # kept a + aside (1 - a) = held
    assert num_kept == pytest.approx(round(num_kept), abs=1e-6) and 0 < num_kept < 300
    plain = run_one(make_row(tmp_path, balancing__enabled=False, **settings), 0, keep=tmp_path / "3")
    assert "wrong_labels" not in plain  # nobody chooses
    shutil.rmtree(tmp_path / "state")


@pytest.mark.slow
@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_every_row_of_every_set_runs(folder: Path, tmp_path: Path) -> None:
    """On the digits, with the tiny model, four clients and one round in place of the set's own."""
    small = {key: value for key, value in quick(tmp_path, num_server_rounds=1).items() if key not in GIVEN}
    small |= dict.fromkeys(("data.num-test", "data.num-public", "data.num-validation"), -1) | {"data.image-size": 0}
    for row in read_rows([folder], overrides=small):
        result = run_one(row, 0, keep=tmp_path / row.name)
        assert 0 <= result["accuracy"]["1"] <= 1, row.name


def test_the_memory_of_this_process_is_known() -> None:
    import os

    found = memory_of(os.getpid())
    if found is None:
        pytest.skip("this system does not tell a process's memory")
    assert 10 * 2**20 < found[0] <= found[1]
    assert memory_of(2**22 + 1) is None


class Machine:
    """A machine whose memory and clock a test sets; in MiB."""

    def __init__(self, free: int, **of_pid: tuple[int, int]) -> None:
        self.free, self.time, self.said = free, 0.0, list[str]()
        self.of_pid = of_pid

    def gate(self, *known: int) -> MemoryGate:
        return MemoryGate(
            [peak * 2**20 for peak in known],
            measure=lambda pid: tuple(x * 2**20 for x in self.of_pid[f"p{pid}"]) if f"p{pid}" in self.of_pid else None,  # type: ignore[arg-type,return-value]
            free=lambda: self.free * 2**20,
            clock=lambda: self.time,
            say=self.said.append,
        )


def test_the_first_job_runs_alone_until_its_peak_has_settled() -> None:
    machine = Machine(free=2500, p1=(100, 100))
    gate = machine.gate()
    assert gate.may_start([])
    machine.time = 10
    assert not gate.may_start([1])  # it still grows
    machine.time, machine.of_pid["p1"] = 15, (900, 1000)
    assert not gate.may_start([1])
    machine.time, machine.of_pid["p1"] = 34, (900, 1010)
    assert not gate.may_start([1])
    machine.time, machine.of_pid["p1"] = 36, (900, 1010)  # what creeps by less than two percent has settled
    assert gate.may_start([1]) and machine.said == []  # needs 1111, and 2500 - 110 that the first may still take are free
    machine.of_pid["p2"], machine.free = (200, 200), 1930
    assert not gate.may_start([1, 2])  # 1930 - 110 - 810 = 1010 < 1111
    assert not gate.may_start([1, 2]) and len(machine.said) == 1
    assert "takes up to 1010 MiB, and 1010 MiB are left beside the 2 that run" in machine.said[0]
    del machine.of_pid["p1"]
    assert gate.may_start([2])  # the first has ended: 1930 - 810 = 1120


def test_what_finished_jobs_took_is_known_from_the_start() -> None:
    machine = Machine(free=1200, p1=(10, 10))
    assert not machine.gate(1000).may_start([1])  # 1200 - 990 < 1100, whatever the first job has shown yet
    machine.free = 2100
    gate = machine.gate(1000)
    assert gate.may_start([1])
    gate.learn(1500 * 2**20)
    assert not gate.may_start([1])


def test_nothing_is_held_back_where_memory_cannot_be_measured() -> None:
    machine = Machine(free=1)
    assert machine.gate().may_start([1, 2, 3])
    assert machine.gate(10**6).may_start([])  # one job always runs
