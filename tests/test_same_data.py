"""A run goes on only with the data that it began with, and ends when its numbers are no numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from helpers import quick, run_and_kill, save_image, watch_log, write_folder
from safetensors import safe_open
from safetensors.numpy import load_file

from fbl_flower.balancing.state import StateStore
from fbl_flower.data.datasets import forget_parts
from fbl_flower.errors import RunFailed, StateError
from fbl_flower.federation import client, server
from fbl_flower.federation.local import LocalGrid, run_local
from fbl_flower.federation.report import choices_by_round
from fbl_flower.federation.wire import Request
from fbl_flower.reporting.rundir import Checkpoint


def of_folder(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    """A federation on a folder of its own images, killed and resumed in these tests."""
    write_folder(tmp_path / "photos", {"ant": 40, "bee": 30, "cat": 30})
    own = {"data.name": "folder", "data.path": str(tmp_path / "photos"), "data.image-size": 8, "data.num-private": -1}
    return quick(tmp_path) | own | {"checkpoint-every": 1, "num-server-rounds": 3} | settings


def strict_json(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refuse)


def grow(photos: Path) -> None:
    save_image(photos / "ant" / "zzz.png", (250, 1, 2))


def alter(photos: Path) -> None:
    save_image(photos / "bee" / "000.png", (251, 1, 2))


def rename(photos: Path) -> None:
    (photos / "cat").rename(photos / "dog")


def add_class(photos: Path) -> None:
    write_folder(photos, {"elk": 30}, first=200)


@pytest.mark.parametrize(
    ("change", "names"),
    [(grow, ["private"]), (alter, []), (rename, ["classes", "cat", "dog"]), (add_class, ["classes", "elk"])],
)
def test_a_resume_on_other_data_stops_with_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], names: list[str]
) -> None:
    settings = of_folder(tmp_path)
    unbroken = (run_local(settings).run_dir / "metrics.jsonl").read_bytes()
    killed = run_and_kill(settings, monkeypatch, in_round=2)
    left = {path.name: path.read_bytes() for path in killed.iterdir() if path.is_file()}
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "photos", kept)
    change(tmp_path / "photos")
    forget_parts()  # as in a new process
    with pytest.raises(StateError) as caught:
        run_local(settings | {"resume": str(killed)})
    assert "data set has changed" in str(caught.value) and all(name in str(caught.value) for name in names)
    assert {path.name: path.read_bytes() for path in killed.iterdir() if path.is_file()} == left  # as it was
    shutil.rmtree(tmp_path / "photos")
    kept.rename(tmp_path / "photos")
    forget_parts()
    run_local(settings | {"resume": str(killed)})
    assert (killed / "metrics.jsonl").read_bytes() == unbroken


def test_a_completed_run_stays_completed_when_it_cannot_be_prolonged(tmp_path: Path) -> None:
    settings = of_folder(tmp_path, **{"num-server-rounds": 1})
    run = run_local(settings).run_dir
    left = {path.name: path.read_bytes() for path in run.iterdir()}
    grow(tmp_path / "photos")
    forget_parts()
    with pytest.raises(StateError, match="data set has changed"):
        run_local(settings | {"resume": str(run), "num-server-rounds": 2})
    assert {path.name: path.read_bytes() for path in run.iterdir()} == left


def test_changed_files_are_read_again_by_the_next_run_of_a_process(tmp_path: Path) -> None:
    settings = of_folder(tmp_path, **{"num-server-rounds": 1, "balancing.enabled": False, "fraction-train": 1.0})
    for gone in (0, 20):
        for file in sorted((tmp_path / "photos" / "ant").iterdir())[:gone]:
            file.unlink()
        row = json.loads((run_local(settings).run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["num_real"] == 100 - gone - round(0.2 * (100 - gone)) - round(0.1 * (100 - gone))


def test_a_checkpoint_that_does_not_say_what_it_is_of(tmp_path: Path) -> None:
    point = Checkpoint(server_round=1, arrays={}, embeddings=None)
    with pytest.raises(StateError, match="does not say which images"):
        point.check_data({"test": "1 images"})


def test_a_node_whose_images_change_is_left_out_by_name(tmp_path: Path) -> None:
    """Node 2 gets one more image between rounds 1 and 2. The server learns that they changed, and no count."""
    config = of_folder(tmp_path) | {
        "data.classes": "ant,bee,cat", "num-clients": 3, "fraction-train": 1.0, "num-server-rounds": 2,
        "balancing.enabled": False,
    }  # fmt: skip
    folders = {n: write_folder(tmp_path / f"device{n}", {"ant": 3, "bee": n}) for n in (1, 2, 3)}

    def train(message: Message, context: Context) -> Message:
        if Request.from_record(message.content).server_round == 2 and context.node_id == 2:
            save_image(folders[2] / "cat" / "new.png", (7, 7, 7))
            client.forget_clients()
        return client.train(message, context)

    app = ClientApp()
    app.query("describe")(client.describe)
    app.train("prepare")(client.prepare)
    app.train()(train)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with LocalGrid(app, num_nodes=3, run_config=config) as grid:
        for node, folder in folders.items():
            grid._contexts[node].node_config |= {"data-path": str(folder), "state-dir": str(tmp_path / f"state{node}")}
        server.app(grid, context)
    run_dir = Path(str(context.state.config_records["run"]["directory"]))
    reason = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["left_out"]["1"]
    assert reason.startswith("its images are not those with which it began this run")
    told = (tmp_path / "state2" / "client-errors.log").read_text()
    assert "[3, 2, 0] before, [3, 2, 1] now" in told and "[3, 2" not in reason


@pytest.mark.parametrize(
    "settings",
    [
        {"train.learning-rate": 1e6, "train.clip-norm": 0.0},
        {"train.learning-rate": 1e6, "num-server-rounds": 6},
        {"train.learning-rate": 1e5, "num-server-rounds": 6},
        {"method.name": "scaffold", "scaffold.server-learning-rate": 1e6, "balancing.enabled": False},
        {"warm-start.enabled": True, "warm-start.images": "public", "warm-start.epochs": 2, "warm-start.learning-rate": 1e6},
    ],
)
def test_a_run_that_diverges_fails_by_name_and_leaves_only_numbers(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(RunFailed, match="not finite|diverged"):
        run_local(quick(tmp_path, checkpoint_every=1) | settings)
    (run_dir,) = (tmp_path / "runs").iterdir()
    summary = strict_json((run_dir / "summary.json").read_text())
    assert summary["status"] == "failed" and ("not finite" in summary["reason"] or "diverged" in summary["reason"])
    for file in run_dir.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            strict_json(line)
    assert not (run_dir / "model.safetensors").exists()
    for file in run_dir.glob("checkpoint.safetensors"):
        with safe_open(file, "numpy") as stored:
            assert all(np.isfinite(stored.get_tensor(name)).all() for name in list(stored.keys()))


def test_a_round_without_any_image_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is made up where there is none."""
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    settings = quick(tmp_path, num_clients=60, data__alpha=0.01, data__num_private=60, fraction_train=0.01)
    run_dir = run_local(settings | {"num-server-rounds": 20, "balancing.enabled": False}).run_dir
    rows = [strict_json(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()[1:]]
    empty = [row for row in rows if row["num_examples"] == 0]
    assert empty and all(row["train_loss"] is None for row in empty)
    assert sum("no client of this round has an image" in line for line in lines) == len(empty)
    assert all(row["train_loss"] > 0 for row in rows if row["num_examples"])


def test_what_came_of_a_lost_reply_is_forgotten(tmp_path: Path) -> None:
    """Client 1's reply of round 2 is lost, with a replay in it. Its round 3 is that of a client that never trained in round 2."""

    def federate(name: str, *, lose: bool) -> tuple[Path, dict[str, Any]]:
        def train(message: Message, context: Context) -> Message:
            request = Request.from_record(message.content)
            drawn = (request.client, request.server_round) == (1, 2)
            if drawn and not lose:
                raise ConnectionError("lost before")
            reply = client.train(message, context)
            if drawn:
                raise ConnectionError("lost after")
            return reply

        app = ClientApp()
        app.query("describe")(client.describe)
        app.train("prepare")(client.prepare)
        app.train()(train)
        config = quick(tmp_path / name, fraction_train=1.0, balancing__replay_period=1, checkpoint_every=1)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
        with LocalGrid(app, num_nodes=4, run_config=config) as grid:
            server.app(grid, context)
        return Path(str(context.state.config_records["run"]["directory"])), config

    (lost, lost_config), (never, never_config) = federate("lost", lose=True), federate("never", lose=False)
    for name, array in load_file(lost / "model.safetensors").items():
        np.testing.assert_array_equal(array, load_file(never / "model.safetensors")[name])
    states = [
        StateStore(client.state_folder(config["state-dir"], run.name, 1)).newest()
        for run, config in ((lost, lost_config), (never, never_config))
    ]
    assert states[0] is not None and states[1] is not None
    assert states[0].kept.equal(states[1].kept) and states[0].embeddings.equal(states[1].embeddings)


def test_a_choice_is_counted_on_the_clients_own_disk(tmp_path: Path) -> None:
    run = run_local(quick(tmp_path, fraction_train=1.0, balancing__replay_period=1, balancing__replay_ratio=0.5)).run_dir
    rows = [
        json.loads(line)
        for line in (client.state_folder(tmp_path / "state", run.name, 0) / "choices.jsonl").read_text().splitlines()
    ]
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert rows[0]["kept_again"] is None and rows[0]["replayed"] == 0
    assert all(0 < row["replayed"] <= row["kept"] and row["kept_again"] + row["replayed"] <= row["kept"] for row in rows[1:])


def test_a_longer_run_says_that_its_schedule_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    settings = quick(tmp_path, train__schedule="cosine", num_server_rounds=2)
    run = run_local(settings).run_dir
    run_local(settings | {"num-server-rounds": 3, "resume": str(run)})
    told = [line for line in lines if "num-server-rounds was 2 and is 3" in line]
    assert len(told) == 1 and "not that of one unbroken run" in told[0]
    assert "num-server-rounds was 2 and is 3" in (run / "nodes.json").read_text()


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_a_killed_run_keeps_its_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    settings = quick(tmp_path, train__schedule=schedule, train__nesterov=True, checkpoint_every=2, num_server_rounds=4)
    unbroken = run_local(settings).run_dir
    killed = run_and_kill(settings, monkeypatch, in_round=4)
    run_local(settings | {"resume": str(killed)})
    assert (killed / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def test_an_error_that_cannot_be_noted_still_reaches_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not UTF-8 in the error's text, or a state-dir that is a file, hide nothing."""

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("caf\udce9")

    monkeypatch.setattr(client, "_client_data", breaks)
    for state_dir in (tmp_path / "good", tmp_path / "a-file"):
        (tmp_path / "a-file").write_text("")
        config = quick(tmp_path) | {"state-dir": str(state_dir)}
        request = Request(run="20260101-000000-aaaaaa", client=0, arrays={})
        context = Context(
            run_id=1, node_id=1, node_config={"partition-id": 0, "num-partitions": 4}, state=RecordDict(), run_config=config
        )
        message = Message(request.to_record(), dst_node_id=1, message_type="train.prepare")
        answer = client.prepare(message, context)
        assert answer.has_error() and answer.error.reason.startswith("RuntimeError")
    assert "caf\\udce9" in (tmp_path / "good" / "client-errors.log").read_text(encoding="utf-8")


def test_choices_are_summed_by_round(tmp_path: Path) -> None:
    """Round 6: 10 + 4 kept, 7 + 1 of them before, 1 + 0 replayed; the first choices count nowhere, a repeated round once."""
    lines = {
        "a": [(1, 10, None, 0), (6, 10, 9, 9), (6, 10, 7, 1)],
        "b": [(2, 4, None, 0), (6, 4, 1, 0), (11, 4, 4, 0)],
        "c": [],
    }
    for name, rows in lines.items():
        (tmp_path / name).mkdir()
        text = "".join(
            json.dumps({"round": r, "kept": k, "kept_again": again, "replayed": n}) + "\n" for r, k, again, n in rows
        )
        if rows:
            (tmp_path / name / "choices.jsonl").write_text(text)
    everybody = {number: {0, 1, 2} for number in (1, 2, 6, 11)}
    folders = [tmp_path / name for name in lines]
    assert choices_by_round(folders, everybody | {6: {1}})[0] == {
        "round": 6, "clients": 1, "kept": 4, "kept_again": 1, "replayed": 0,
    }  # fmt: skip
    assert choices_by_round(folders, everybody) == [
        {"round": 6, "clients": 2, "kept": 14, "kept_again": 8, "replayed": 1},
        {"round": 11, "clients": 1, "kept": 4, "kept_again": 4, "replayed": 0},
    ]
