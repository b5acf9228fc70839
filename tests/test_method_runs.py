"""The local methods in federations: reductions, memory on the clients' disks, what travels, and resuming."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from helpers import RecordingGrid, quick, run_and_kill, watch_log
from safetensors.numpy import load_file

from fbl_flower.config import RunConfig
from fbl_flower.federation import client, method_rounds, server
from fbl_flower.federation.local import LocalGrid, run_local
from fbl_flower.federation.method_rounds import roles_of
from fbl_flower.federation.roster import Roster
from fbl_flower.federation.wire import Reply, Request
from fbl_flower.methods.fedgen import LABEL_COUNTS
from fbl_flower.training.roles import Role

Settings = dict[str, Any]


def small(tmp_path: Path, **overrides: Any) -> Settings:
    return quick(tmp_path, data__num_private=120, fedgen__steps=5, **overrides)


def test_clients_that_train_at_the_same_time_do_not_change_each_others_rounding(tmp_path: Path) -> None:
    """FedGen uses the head twice in a step: with torch's cache of cast weights, its gradient would be summed in bf16 or in fp32, by chance."""
    settings = quick(
        tmp_path, method__name="fedgen", fraction_train=1.0, balancing__enabled=False, train__precision="bf16", train__epochs=2
    )
    models = {(run_local(settings, workers=n).run_dir / "model.safetensors").read_bytes() for n in (1, 2, 2, 2)}
    assert len(models) == 1


def results(run_dir: Path) -> tuple[bytes, bytes]:
    """Return the metrics but for the bytes that travelled, which methods do not have in common, and the model."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({key: value for key, value in row.items() if not key.startswith("bytes_")}) for row in rows]
    return "\n".join(lines).encode(), (run_dir / "model.safetensors").read_bytes()


def checkpoint(run_dir: Path, method: str) -> dict[str, np.ndarray]:
    prefix = f"method-state/{method}/"
    arrays = load_file(run_dir / "checkpoint.safetensors")
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def memory(settings: Settings, run_dir: Path, number: int, method: str) -> dict[str, np.ndarray]:
    """Return what a client remembers of its method."""
    folder = client.state_folder(settings["state-dir"], run_dir.name, number) / method
    return load_file(max(folder.iterdir()))


def federate(settings: Settings, app: ClientApp = client.app, *, workers: int = 1) -> tuple[Path, list[Message]]:
    """Run a federation and return its directory and every message."""
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)
    with LocalGrid(app, num_nodes=4, run_config=settings, workers=workers) as grid:
        recorder = RecordingGrid(grid)
        server.app(recorder, context)
    return Path(str(context.state.config_records["run"]["directory"])), recorder.messages


@pytest.mark.parametrize("balancing", [True, False], ids=["balanced", "own-data"])
def test_a_method_of_no_strength_is_federated_averaging_bit_for_bit(tmp_path: Path, balancing: bool) -> None:
    fedavg = run_local(small(tmp_path, balancing__enabled=balancing))
    for method, strength in (("fedprox", "mu"), ("moon", "mu"), ("fedgen", "latent-weight")):
        key = {"method.name": method, "balancing.enabled": balancing}
        none = run_local(small(tmp_path) | key | {f"{method}.{strength}": 0.0})
        assert results(none.run_dir) == results(fedavg.run_dir), method
        some = run_local(small(tmp_path) | key | {f"{method}.{strength}": 0.5})
        assert results(some.run_dir) != results(fedavg.run_dir), method
        assert some.summary["left_out"] == {}


@pytest.mark.parametrize("balancing", [True, False], ids=["balanced", "own-data"])
def test_without_variates_scaffold_is_federated_averaging_by_plain_sgd(tmp_path: Path, balancing: bool) -> None:
    """In round 1 all variates are zero; in round 2 they are not. The step size is its own, or that of the training settings."""
    own = {"train__momentum": 0.0, "train__clip_norm": 0.0, "train__learning_rate": 0.02}
    fedavg = run_local(small(tmp_path, balancing__enabled=balancing, fraction_train=1.0, **own))
    settings = small(tmp_path, balancing__enabled=balancing, fraction_train=1.0, method__name="scaffold")
    scaffold = run_local(settings | {"scaffold.learning-rate": 0.02})
    rows = [results(run.run_dir)[0].splitlines() for run in (fedavg, scaffold)]
    assert rows[0][:2] == rows[1][:2] and rows[0][2] != rows[1][2]
    same = run_local(settings | {"train.learning-rate": 0.02})
    assert results(same.run_dir) == results(scaffold.run_dir)


def test_the_servers_step_size_scales_its_step(tmp_path: Path) -> None:
    """One round from x: with eta_g = 0.5 the model goes half of the way, up to float32's rounding."""
    settings = small(tmp_path, method__name="scaffold", num_server_rounds=1, model__name="tiny")
    start, whole, half = (
        load_file(run_local(settings | extra).run_dir / "model.safetensors")
        for extra in ({"scaffold.learning-rate": 1e-12}, {}, {"scaffold.server-learning-rate": 0.5})
    )
    for name in start:
        np.testing.assert_allclose(half[name] - start[name], (whole[name] - start[name]) / 2, atol=1e-6)
    assert any(np.abs(whole[name] - start[name]).max() > 1e-3 for name in start)


def test_the_servers_variate_is_the_mean_of_the_clients_even_when_a_reply_is_lost(tmp_path: Path) -> None:
    """Client 1 trains in round 2, writes its variate, and its reply is lost. In round 3 it goes back to what the server knows."""

    def train(message: Message, context: Context) -> Message:
        reply = client.train(message, context)
        request = Request.from_record(message.content)
        if (request.client, request.server_round) == (1, 2):
            raise ConnectionError("lost")
        return reply

    app = ClientApp()
    app.query("describe")(client.describe)
    app.train("prepare")(client.prepare)
    app.train()(train)
    settings = small(tmp_path, method__name="scaffold", fraction_train=1.0, num_server_rounds=3, checkpoint_every=1)
    run_dir, _ = federate(settings, app)
    assert "lost" in json.loads(results(run_dir)[0].splitlines()[2])["left_out"]["1"]
    clients = [memory(settings, run_dir, k, "scaffold") for k in range(4)]
    for name, variate in checkpoint(run_dir, "scaffold").items():
        np.testing.assert_allclose(variate, np.mean([c_i[name] for c_i in clients], axis=0), atol=1e-5)
        assert np.abs(variate).max() > 1e-4


@pytest.mark.parametrize("method", ["scaffold", "moon", "fedgen"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Killed in round 4, after a checkpoint in round 2: clients are ahead, and their process has forgotten them."""
    settings = small(tmp_path, method__name=method, num_server_rounds=5, checkpoint_every=2)
    unbroken = run_local(settings)
    killed = run_and_kill(settings, monkeypatch, in_round=4)
    client._prepared.cache_clear()
    run_local(settings | {"resume": str(killed)})
    assert results(killed) == results(unbroken.run_dir)
    for name, array in checkpoint(unbroken.run_dir, method).items():
        np.testing.assert_array_equal(array, checkpoint(killed, method)[name])


@pytest.mark.parametrize("method", ["scaffold", "moon", "feddyn"])
def test_what_a_client_remembers_changes_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A resumed run differs if one client has lost its memory of the method, and the client is named."""
    settings = small(tmp_path, method__name=method, num_server_rounds=2, fraction_train=1.0, balancing__enabled=False)
    whole, robbed = run_local(settings).run_dir, run_local(settings).run_dir
    folder = client.state_folder(settings["state-dir"], robbed.name, 2) / method
    first, second = (load_file(folder / f"round-00000{r}.safetensors") for r in (1, 2))
    assert all(np.abs(first[name] - second[name]).max() > 0 for name in ("head.weight", "features.0.weight"))
    shutil.rmtree(folder)
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    for run_dir in (whole, robbed):
        run_local(settings | {"num-server-rounds": 3, "resume": str(run_dir)})
    assert [line for line in lines if "afresh" in line] == [
        "Round 3: client 2 finds nothing of this run on its disk and starts afresh"
    ]
    assert results(whole) != results(robbed)


def test_a_client_of_moon_remembers_its_own_model_whatever_runs_beside_it(tmp_path: Path) -> None:
    settings = small(tmp_path / "a", method__name="moon", fraction_train=1.0)
    run_dir, messages = federate(settings, workers=4)
    requests = {m.metadata.message_id: Request.from_record(m.content) for m in messages if "request" in m.content}
    last = {
        requests[m.metadata.reply_to_message_id].client: Reply.from_record(m.content).arrays
        for m in messages
        if "metrics" in m.content and requests[m.metadata.reply_to_message_id].server_round == 3
    }
    assert last.keys() == {0, 1, 2, 3}
    for number, sent in last.items():
        remembered = memory(settings, run_dir, number, "moon")
        assert remembered.keys() == sent.keys()
        assert all(np.array_equal(remembered[name], array) for name, array in sent.items())
    alone = run_local(small(tmp_path / "b", method__name="moon", fraction_train=1.0), workers=1)
    assert results(alone.run_dir) == results(run_dir)


def test_only_what_a_method_needs_travels(tmp_path: Path) -> None:
    for method, there, back in (
        ("fedavg", set(), set()),
        ("moon", set(), set()),
        ("scaffold", {"scaffold"}, {"scaffold"}),
        ("fedgen", {"fedgen"}, {"fedgen"}),
        ("feddyn", set(), set()),
        ("logit-adjustment", set(), set()),
    ):
        _, messages = federate(small(tmp_path, method__name=method, num_server_rounds=2, balancing__enabled=False))
        requests = [Request.from_record(m.content) for m in messages if "request" in m.content]
        requests = [r for r in requests if r.server_round > 0]
        replies = [Reply.from_record(m.content) for m in messages if "metrics" in m.content]
        assert len(requests) == len(replies) == 4
        assert [set(r.extras) for r in requests] == ([set()] * 2 if method == "fedgen" else [there] * 2) + [there] * 2
        assert [set(r.extras) for r in replies] == [back] * 4
        assert len({tuple(names) for r in replies for names in r.extras.values()}) == (1 if back else 0)


def test_fedgen_warns_that_label_counts_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(method_rounds, "log", lambda level, text, *values: lines.append(text % values))
    on_nodes: list[str] = []
    client._tell_what_is_sent.cache_clear()
    monkeypatch.setattr(client._log, "warning", lambda text, *values: on_nodes.append(text % values))
    settings = small(tmp_path, method__name="fedgen", num_server_rounds=1, balancing__enabled=False, fraction_train=1.0)
    _, messages = federate(settings)
    warning = "FedGen: its clients send their label counts to the server, as published; class counts do not stay on them"
    assert lines == [warning]
    numbers = range(settings["num-clients"])
    told = [f"client {n}: FedGen sends the label counts of this client to the server, as published" for n in numbers]
    assert sorted(on_nodes) == told
    counts = [Reply.from_record(m.content).extras["fedgen"][LABEL_COUNTS] for m in messages if "metrics" in m.content]
    assert sum(int(c.sum()) for c in counts) == 120
    lines.clear(), on_nodes.clear()
    federate(small(tmp_path, num_server_rounds=1))
    assert lines == on_nodes == []

    def as_if_the_nodes_came_late(config: RunConfig, roster: Roster) -> dict[int, Role]:
        roles = roles_of(config, roster)
        calls.append(roles)
        return (
            {number: dataclasses.replace(role, method="fedavg") for number, role in roles.items()} if len(calls) == 1 else roles
        )

    calls: list[object] = []
    monkeypatch.setattr(server, "roles_of", as_if_the_nodes_came_late)
    federate(small(tmp_path / "late", method__name="fedgen", num_server_rounds=2, balancing__enabled=False))
    assert lines == [warning]


def spoiled(spoil: Callable[[dict[str, Any]], dict[str, Any]]) -> ClientApp:
    """Clients of which number 2 spoils the extra arrays of its reply."""

    def train(message: Message, context: Context) -> Message:
        reply = client.train(message, context)
        if Request.from_record(message.content).client != 2:
            return reply
        fields = vars(Reply.from_record(reply.content))
        return Message(Reply(**fields | {"extras": spoil(fields["extras"])}).to_record(), reply_to=message)

    app = ClientApp()
    app.query("describe")(client.describe)
    app.train("prepare")(client.prepare)
    app.train()(train)
    return app


def test_a_spoiled_variate_is_left_out_like_a_spoiled_model(tmp_path: Path) -> None:
    def not_a_number(extras: dict[str, Any]) -> dict[str, Any]:
        arrays = extras["scaffold"]
        return {"scaffold": arrays | {"head.bias": np.full_like(arrays["head.bias"], np.nan)}}

    settings = small(tmp_path, method__name="scaffold", fraction_train=1.0, num_server_rounds=1, balancing__enabled=False)
    for spoil, reason in (
        (not_a_number, "its model or its loss is not finite"),
        (lambda extras: {}, "it did not send the arrays of its method, scaffold"),
    ):
        run_dir, _ = federate(settings, spoiled(spoil))
        row = json.loads(results(run_dir)[0].splitlines()[-1])
        assert row["clients"] == [0, 1, 3] and row["left_out"] == {"2": reason}
        assert all(np.isfinite(array).all() for array in checkpoint(run_dir, "scaffold").values())
