"""Nodes that come late, leave and return, and the table of them; each federation in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from helpers import quick

from fbl_flower.config import parse_config
from fbl_flower.errors import DataError, RunFailed
from fbl_flower.federation import client, server
from fbl_flower.federation.local import LocalGrid, run_local
from fbl_flower.federation.rounds import choose_clients
from fbl_flower.federation.wire import NodeDescription
from fbl_flower.reporting.rundir import RunDirectory


class Shifting(LocalGrid):
    """Nodes 1 to 4, of which `there(rounds done)` are connected; messages to others are answered as Flower does."""

    run_dirs: Path
    there: Callable[[int], set[int]]

    def get_node_ids(self) -> Iterable[int]:
        rounds = sum(len(file.read_text().splitlines()) - 1 for file in self.run_dirs.glob("*/metrics.jsonl"))
        return sorted(self.there(rounds))


def federate(
    tmp_path: Path,
    there: Callable[[int], set[int]],
    node_config: dict[int, dict[str, Any]] | None = None,
    node_configs: dict[int, Any] | None = None,
    **settings: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run with nodes that come and go; return the rows of the rounds, and nodes.json. `node_configs` is filled with what `there` may change."""
    client._prepared.cache_clear()
    config = quick(tmp_path, **{"fraction_train": 1.0, "num_server_rounds": 4} | settings)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with Shifting(client.app, num_nodes=4, run_config=config) as grid:
        grid.run_dirs, grid.there = tmp_path / "runs", there
        for node, extra in (node_config or {}).items():
            grid._contexts[node].node_config.update(extra)
        if node_configs is not None:
            node_configs |= {node: context.node_config for node, context in grid._contexts.items()}
        server.app(grid, context)
    run_dir = Path(str(context.state.config_records["run"]["directory"]))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows[1:], json.loads((run_dir / "nodes.json").read_text())


def test_the_table_names_nodes_and_why_a_client_is_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_client = client.prepare_client

    def broken(config: Any, number: int, **kwargs: Any) -> Any:
        if number == 2:
            raise DataError("no image of class 7")
        return prepare_client(config, number, **kwargs)

    monkeypatch.setattr(client, "prepare_client", broken)
    names = {1: {"name": "kitchen", "capability": "rich"}, 2: {"name": "  two\nlines "}}
    rows, table = federate(tmp_path, lambda _: {1, 2, 3, 4}, names)
    assert [(row["name"], row["clients"], row["capability"], row["connected"]) for row in table["nodes"]] == [
        ("kitchen", [0], "rich", True), ("two lines", [1], "not stated", True), ("node-2", [2], "not stated", True),
        ("node-3", [3], "not stated", True),
    ]  # fmt: skip
    assert [list(row["not_prepared"]) for row in table["nodes"]] == [[], [], ["2"], []]
    reason = table["nodes"][2]["not_prepared"]["2"]
    assert reason.startswith("its data cannot be used; the client's ") and "class 7" not in json.dumps(table)
    assert all(row["left_out"] == {"2": reason} for row in rows)


def test_a_node_that_comes_late_and_states_something_unknown_is_refused(tmp_path: Path) -> None:
    rows, table = federate(
        tmp_path, lambda done: {1, 2, 3} | ({4} if done >= 1 else set()), {4: {"capability": "strong"}}, prepare__timeout=4.0
    )
    assert [row["clients"] for row in rows] == [[0, 1, 2]] * 4
    assert table["events"] == [] and not table["nodes"][3]["connected"]


def test_a_node_that_was_absent_takes_part_from_the_next_round(tmp_path: Path) -> None:
    """Node 4 comes while round 2 trains: it is in rounds 3 and 4, prepared at first contact."""
    rows, table = federate(tmp_path, lambda done: {1, 2, 3} | ({4} if done >= 2 else set()), prepare__timeout=4.0)
    assert [row["clients"] for row in rows] == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [row["left_out"] for row in rows] == [{}] * 4
    assert table["events"] == [{"round": 3, "name": "node-3", "event": "joined"}]
    assert all(row["connected"] and not row["not_prepared"] for row in table["nodes"])


def test_a_node_that_leaves_is_named_and_its_clients_return_with_it(tmp_path: Path) -> None:
    rows, table = federate(tmp_path, lambda done: {1, 2, 3, 4} - ({2} if done in (1, 2) else set()))
    assert [row["clients"] for row in rows] == [[0, 1, 2, 3], [0, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert [row["left_out"] for row in rows] == [{}, {"1": "its node is not connected"}, {"1": "its node is not connected"}, {}]
    assert [(event["round"], event["event"]) for event in table["events"]] == [(2, "not connected"), (4, "connected again")]


def test_a_node_with_a_new_id_takes_its_old_place(tmp_path: Path) -> None:
    """Node 4 says that it is partition 1, which node 2 was; from round 3 on its answers count, and nobody trains twice."""
    asked: list[tuple[int, int]] = []

    def there(done: int) -> set[int]:
        return {1, 2, 3} | ({4} if done >= 2 else set())

    class Noting(Shifting):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == "train":
                    number = message.content.config_records["request"]
                    asked.append((int(str(number["server-round"])), message.metadata.dst_node_id))
            return super().push_messages(messages)

    config = quick(tmp_path, fraction_train=1.0, num_server_rounds=3, num_clients=3)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with Noting(client.app, num_nodes=4, run_config=config) as grid:
        grid.run_dirs, grid.there = tmp_path / "runs", there
        for node, place in {1: 0, 2: 1, 3: 2, 4: 1}.items():
            grid._contexts[node].node_config.update({"partition-id": place, "num-partitions": 3})
        server.app(grid, context)
    assert asked == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 4), (3, 3)]


def test_a_node_that_was_refused_is_heard_again_when_it_was_mended_and_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restarted node has its old id, because that belongs to its key: node 4 comes in round 2, goes, and is another in round 4."""
    states = {"4": "strong"}

    def there(done: int) -> set[int]:
        states["4"] = "strong" if done < 3 else "none"
        return {1, 2, 3} | ({4} if done in (1, 3) else set())

    describe_node = client.describe_node

    def describe(context: Context) -> NodeDescription:
        node = describe_node(context)
        return replace(node, capability=states["4"]) if node.partition_id == 3 else node

    monkeypatch.setattr(client, "describe_node", describe)
    rows, table = federate(tmp_path, there, prepare__timeout=4.0)
    assert [row["clients"] for row in rows] == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]
    assert table["events"] == [{"round": 4, "name": "node-3", "event": "joined"}]


def test_a_node_that_returns_as_another_is_taken_for_what_it_is_now(tmp_path: Path) -> None:
    """Node 2 starts as partition 3 by mistake, while nobody is partition 1; it is away in round 2, and returns as 1."""
    nodes: dict[int, Any] = {}

    def there(done: int) -> set[int]:
        if done >= 2:
            nodes[2]["partition-id"] = 1
        return {1, 3} | (set() if done == 1 else {2})

    rows, table = federate(tmp_path, there, {2: {"partition-id": 3}}, nodes, prepare__timeout=4.0)
    assert [row["clients"] for row in rows] == [[0, 2, 3], [0, 2], [0, 1, 2], [0, 1, 2]]
    assert [(event["round"], event["name"], event["event"]) for event in table["events"]] == [
        (2, "node-3", "not connected"), (3, "node-1", "joined"),
    ]  # fmt: skip


def test_a_connected_nodes_place_is_not_taken_by_one_of_another_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Node 4 comes in round 2 as partition 1, which is b's; it gets the place in round 4, when b has left."""
    names = {1: {"name": "a"}, 2: {"name": "b"}, 3: {"name": "c"}, 4: {"name": "d", "partition-id": 1}}

    def there(done: int) -> set[int]:
        return {1, 2, 3} - ({2} if done >= 3 else set()) | ({4} if done >= 1 else set())

    rows, table = federate(tmp_path, there, names, prepare__timeout=4.0)
    assert [row["clients"] for row in rows] == [[0, 1, 2]] * 4
    assert [(event["round"], event["name"], event["event"]) for event in table["events"]] == [
        (4, "b", "not connected"), (4, "d", "took the place of b"),
    ]  # fmt: skip
    refusals = [text for text in caplog.messages if "is refused" in text]
    assert refusals == ["Round 2: node d is refused: its partition-id, 1, is that of b, which is connected; give it its own"]


def test_a_client_is_not_trained_by_a_node_that_does_not_host_it(tmp_path: Path) -> None:
    """Node 2 was restarted as another partition so fast that the server has not seen it leave."""
    nodes: dict[int, Any] = {}

    def there(done: int) -> set[int]:
        if done >= 2:
            nodes[2]["partition-id"] = 2
        return {1, 2, 3, 4}

    rows, _ = federate(tmp_path, there, node_configs=nodes)
    assert [row["clients"] for row in rows] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 3], [0, 2, 3]]
    assert rows[2]["left_out"]["1"].startswith("this node does not host client 1: it is partition 2 of 4")


def test_the_number_of_nodes_is_what_most_of_them_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A node that claims to be one of a million makes nobody wait for the others; as many against as many end the run."""
    started = time.monotonic()
    rows, table = federate(
        tmp_path / "a", lambda _: {1, 2, 3, 4}, {1: {"num-partitions": 10**6, "name": "liar"}}, prepare__timeout=600.0
    )
    assert [row["clients"] for row in rows] == [[1, 2, 3]] * 4 and time.monotonic() - started < 300
    assert (
        "Node liar is refused: its num-partitions is 1000000, and not 4; give all nodes the number of nodes" in caplog.messages
    )
    assert len(table["nodes"]) == 4
    others = {node: {"num-partitions": 5} for node in (3, 4)}
    with pytest.raises(RunFailed, match=r"different num-partitions \(node-0: 4, node-1: 4, node-2: 5, node-3: 5\)"):
        federate(tmp_path / "b", lambda _: {1, 2, 3, 4}, others, prepare__timeout=2.0)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"partition-id": 1}, "Node node-1 is refused: its partition-id, 1, is that of node-1; give it its own"),
        ({"partition-id": 4}, "Node 4 did not say who it is: partition-id: expected a whole number from 0 to 3"),
        ({"num-partitions": 10**9}, "Node 4 did not say who it is: num-partitions: expected a whole number from 1 to 1000000"),
        ({"capability": "strong"}, "Node node-3 is refused: capability: got 'strong'; allowed in a node's --node-config"),
    ],
)
def test_a_node_with_a_wrong_place_is_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lie: dict[str, Any], reason: str
) -> None:
    rows, _ = federate(tmp_path, lambda _: {1, 2, 3, 4}, {4: lie}, num_server_rounds=1)
    assert [row["clients"] for row in rows] == [[0, 1, 2]]
    assert any(message.startswith(reason) for message in caplog.messages)


def test_a_run_goes_on_where_the_only_client_that_is_drawn_is_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_client = client.prepare_client
    config = parse_config(quick(tmp_path, fraction_train=0.25))
    (broken,) = choose_clients(config.fraction_train, [0, 1, 2, 3], 1, seed=config.seed)

    def prepare(config: Any, number: int, **kwargs: Any) -> Any:
        if number == broken:
            raise DataError("no image")
        return prepare_client(config, number, **kwargs)

    monkeypatch.setattr(client, "prepare_client", prepare)
    rows, _ = federate(tmp_path, lambda _: {1, 2, 3, 4}, fraction_train=0.25)
    assert len(rows) == 4 and all(len(row["clients"]) == 1 and broken not in row["clients"] for row in rows)


def test_a_newcomer_with_other_code_is_refused_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(context: Context) -> NodeDescription:
        place = int(str(context.node_config["partition-id"]))
        own = server.call_roll.__globals__["code_fingerprint"]()
        return NodeDescription(partition_id=place, num_partitions=4, code="0" * 64 if place == 3 else own, name=f"n{place}")

    monkeypatch.setattr(client, "describe_node", describe)
    rows, table = federate(tmp_path, lambda done: {1, 2, 3} | ({4} if done >= 1 else set()), prepare__timeout=4.0)
    assert [row["clients"] for row in rows] == [[0, 1, 2]] * 4
    assert table["nodes"][3]["not_prepared"] == {"3": "no node hosts it"}


def test_a_server_that_is_started_again_keeps_who_left_and_who_was_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 1 is away in round 2 and client 2 is broken; the server is killed in round 4; then client 3 is broken and 2 still is."""
    prepare_client, append, write_json = client.prepare_client, RunDirectory.append, RunDirectory.write_json
    broken = {2: "no image"}

    def prepare(config: Any, number: int, **kwargs: Any) -> Any:
        if number in broken:
            raise DataError(broken[number], public=broken[number])
        return prepare_client(config, number, **kwargs)

    def dies(self: RunDirectory, name: str, row: dict[str, Any]) -> None:
        if row["round"] == 4:
            raise KeyboardInterrupt
        append(self, name, row)

    def there(done: int) -> set[int]:
        return {1, 2, 3, 4} - ({1} if done == 1 else set())

    monkeypatch.setattr(client, "prepare_client", prepare)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", dies)
        patch.setattr(RunDirectory, "write_json", lambda s, n, v: None if n == "summary.json" else write_json(s, n, v))
        with pytest.raises(KeyboardInterrupt):
            federate(tmp_path, there, checkpoint_every=1)
    broken |= {2: "no disk", 3: "no image"}
    rows, table = federate(tmp_path, there, checkpoint_every=1, resume="auto")
    assert [row["clients"] for row in rows] == [[0, 1, 3], [1, 3], [0, 1, 3], [0, 1]]
    assert [(event["round"], event["name"], event["event"]) for event in table["events"]] == [
        (2, "node-0", "not connected"), (3, "node-0", "connected again"), (4, "server", "started again"),
    ]  # fmt: skip
    (run_dir,) = (tmp_path / "runs").iterdir()
    parts = {client: reason.count("; the client's") for client, reason in table["not_prepared"].items()}
    assert parts == {"2": 2, "3": 1} and all(reason in table["not_prepared"]["2"] for reason in ("no image", "no disk"))
    assert json.loads((run_dir / "summary.json").read_text())["not_prepared"] == table["not_prepared"]


def test_a_round_waits_for_somebody_and_fails_when_nobody_comes(tmp_path: Path) -> None:
    looks = 0

    def there(done: int) -> set[int]:
        nonlocal looks
        looks += done == 2
        return {1, 2, 3, 4} if done != 2 or looks > 2 else set()

    rows, _ = federate(tmp_path / "back", there)
    assert [row["clients"] for row in rows] == [[0, 1, 2, 3]] * 4
    with pytest.raises(RunFailed, match="round 3: no node that hosts a client is connected, after 1 s"):
        federate(tmp_path / "gone", lambda done: {1, 2, 3, 4} if done < 2 else set(), timeout=1.0)


def test_the_quorum_is_of_all_clients(tmp_path: Path) -> None:
    """Three of four are prepared: 0.75 is enough, 0.76 is not."""
    rows, _ = federate(tmp_path / "enough", lambda _: {1, 2, 3}, prepare__quorum=0.75, prepare__timeout=4.0)
    assert len(rows) == 4
    with pytest.raises(
        RunFailed, match=r"3 of 4 clients are prepared; prepare.quorum = 0.76 asks for 4: client 3: no node hosts it"
    ):
        federate(tmp_path / "few", lambda _: {1, 2, 3}, prepare__quorum=0.76, prepare__timeout=4.0)


def test_plain_fedavg_is_checked_before_it_trains_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client._prepared.cache_clear()

    def unreadable(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(client, "prepare_client", unreadable)
    with pytest.raises(RunFailed, match="no client could be prepared: client 0: its disk: Permission denied"):
        run_local(quick(tmp_path, balancing__enabled=False))
