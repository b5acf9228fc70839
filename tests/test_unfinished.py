"""`resume = "auto"`: the same command goes on where a killed server stopped."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from helpers import quick, run_and_kill

from fbl_flower.claim import Claim
from fbl_flower.commands.overrides import chosen_config
from fbl_flower.config import DataConfig, RunConfig, flatten, parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.errors import ConfigError, StateError
from fbl_flower.federation import client
from fbl_flower.federation.local import run_local
from fbl_flower.reporting.rundir import RunDirectory, changed_settings
from fbl_flower.reporting.unfinished import open_run

DIGITS = load_parts(DataConfig(name="digits", num_private=300)).identity  # what `quick` reads


def killed_in_round(number: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until the server would write the line of a round, and end there without a word, as a kill does."""
    client._prepared.cache_clear()
    append, write_json = RunDirectory.append, RunDirectory.write_json

    def dies(self: RunDirectory, name: str, row: dict[str, Any]) -> None:
        if row["round"] == number:
            raise KeyboardInterrupt
        append(self, name, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", dies)
        patch.setattr(RunDirectory, "write_json", lambda s, n, v: None if n == "summary.json" else write_json(s, n, v))
        with pytest.raises(KeyboardInterrupt):
            run_local(settings)


def test_the_same_command_goes_on_and_then_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(tmp_path, num_server_rounds=6, checkpoint_every=2)
    unbroken = run_local(settings)
    settings |= {"resume": "auto"}
    killed_in_round(4, settings, monkeypatch)
    (killed,) = [path for path in (tmp_path / "runs").iterdir() if path != unbroken.run_dir]
    assert not (killed / "summary.json").exists()
    resumed = run_local(settings)
    assert resumed.run_dir == killed
    assert (killed / "metrics.jsonl").read_bytes() == (unbroken.run_dir / "metrics.jsonl").read_bytes()
    assert json.loads((killed / "summary.json").read_text())["status"] == "completed"
    fresh = run_local(settings)  # nothing is unfinished any more
    assert fresh.run_dir not in (killed, unbroken.run_dir)


@pytest.mark.parametrize("where", ["in-round-3", "before-its-summary-was-removed"])
def test_a_prolonged_run_that_is_killed_is_not_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    settings = quick(tmp_path, num_server_rounds=2, checkpoint_every=1)
    run_dir = run_local(settings).run_dir
    summary = (run_dir / "summary.json").read_text()
    longer = settings | {"num-server-rounds": 4}
    killed_in_round(3, longer | {"resume": str(run_dir)}, monkeypatch)
    assert not (run_dir / "summary.json").exists()
    if where == "before-its-summary-was-removed":
        (run_dir / "summary.json").write_text(summary)
    outcome = run_local(longer | {"resume": "auto"})
    assert outcome.run_dir == run_dir and outcome.summary["rounds"] == 4
    again = run_local(longer | {"resume": str(run_dir)})  # nothing is left to do
    assert again.summary["rounds"] == 4


def test_what_stopped_the_run_before_stays_in_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails in round 2, which it says, and is killed in round 3, of which nothing can be said."""
    settings = quick(tmp_path, num_server_rounds=4, checkpoint_every=1, resume="auto")
    run_dir = run_and_kill(settings, monkeypatch, in_round=2)
    assert json.loads((run_dir / "summary.json").read_text()) == {"status": "failed", "reason": "KeyboardInterrupt"}
    killed_in_round(3, settings, monkeypatch)
    assert not (run_dir / "summary.json").exists()  # it does not say of a run that goes on that it failed
    assert run_local(settings).run_dir == run_dir
    assert json.loads((run_dir / "nodes.json").read_text())["events"] == [
        {"round": 2, "name": "server", "event": "started again after a failure: KeyboardInterrupt"},
        {"round": 3, "name": "server", "event": "started again"},
    ]


def test_the_seconds_of_a_run_are_of_all_its_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(tmp_path, num_server_rounds=2, checkpoint_every=1, resume="auto")
    run_dir = run_and_kill(settings, monkeypatch, in_round=2)
    rows = [json.loads(line) for line in (run_dir / "timings.jsonl").read_text().splitlines()]
    assert rows[0]["clients_seconds"] > 0  # preparation
    rows[1] |= {"clients_seconds": 1000.0, "evaluate_seconds": 200.0}
    (run_dir / "timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 1200 < run_local(settings).summary["seconds"] < 2000


def test_only_the_newest_unfinished_run_with_the_same_settings_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(tmp_path, num_server_rounds=3, checkpoint_every=1)
    found = []
    for other in ({}, {}, {"seed": 1}, {"num-server-rounds": 4}):
        killed_in_round(2, settings | other, monkeypatch)
        (new,) = set((tmp_path / "runs").iterdir()) - set(found)
        found.append(new)
        new.rename(new.with_name(f"2026010{len(found)}-000000-abcdef"))
        found[-1] = new.with_name(f"2026010{len(found)}-000000-abcdef")
    (tmp_path / "runs" / "20270101-000000-abcdef").mkdir()
    (tmp_path / "runs" / "20270101-000000-abcdef" / "checkpoint.safetensors").write_bytes(b"not a run")
    run, start, claim = open_run(parse_config(settings | {"resume": "auto", "timeout": 60.0}), data=DIGITS)
    assert run.path == found[1] and start is not None and start.server_round == 1
    claim.release()
    run, start, claim = open_run(parse_config(settings | {"resume": "auto", "train.batch-size": 7}), data=DIGITS)
    assert run.path not in found and start is None
    claim.release()


def _hold(folder: Path, ready: Any, end: Any) -> None:
    Claim(folder, patience=0.0)
    ready.set()
    end.wait(30)


def test_two_servers_do_not_work_on_one_run(tmp_path: Path) -> None:
    done = run_local(quick(tmp_path, num_server_rounds=1))
    settings = parse_config(quick(tmp_path, num_server_rounds=2, resume=str(done.run_dir)))
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(done.run_dir, ready, end))
    other.start()
    try:
        assert ready.wait(120)
        before = (done.run_dir / "metrics.jsonl").read_bytes()
        with pytest.raises(StateError, match=r"another process works on .*; wait for its end or stop it"):
            open_run(settings, data=DIGITS, patience=0.3)
        assert (done.run_dir / "metrics.jsonl").read_bytes() == before
    finally:
        end.set()
        other.join(30)
    open_run(settings, data=DIGITS, patience=0.3)[2].release()


def test_a_refused_resume_lets_go_of_the_run(tmp_path: Path) -> None:
    done = run_local(quick(tmp_path, num_server_rounds=1))
    with pytest.raises(ConfigError, match="the run to resume has"):
        open_run(parse_config(quick(tmp_path, seed=5, resume=str(done.run_dir))), data=DIGITS)
    Claim(done.run_dir, patience=0.0).release()


def test_the_command_line_takes_auto_for_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert chosen_config(["resume='auto'"])[0].resume == "auto"
    assert chosen_config(["resume='other'"])[0].resume == str(tmp_path / "other")


def test_a_setting_that_a_run_did_not_know_yet_had_its_default() -> None:
    now = flatten(RunConfig())
    before = {key: value for key, value in now.items() if key != "balancing.filter"}
    assert changed_settings(before, now) == {}
    assert changed_settings(before, now | {"balancing.filter": "model"}) == {"balancing.filter": ("none", "model")}
    assert changed_settings(before | {"gone": 1}, now) == {"gone": (1, None)}
    assert changed_settings(before, now | {"num-server-rounds": 99, "timeout": 1.0}) == {}
