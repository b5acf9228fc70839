"""The federation in one process: the same server and clients as in Flower's simulation."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from helpers import quick, run_and_kill, watch_log
from safetensors.numpy import load_file

from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.errors import ConfigError, DataError, FBLError, RunFailed, StateError
from fbl_flower.federation import client, server
from fbl_flower.federation.exchange import ask
from fbl_flower.federation.local import LocalGrid, run_local
from fbl_flower.federation.rounds import choose_clients
from fbl_flower.federation.wire import Reply, Request, array_record, code_fingerprint
from fbl_flower.generation.public import PublicImages
from fbl_flower.training import prepare


@pytest.fixture(autouse=True)
def _forget_clients() -> None:
    """A process remembers prepared clients by their configuration; each test has folders of its own, so only tidiness asks for this."""
    client._prepared.cache_clear()


def metrics(run_dir: Path) -> bytes:
    return (run_dir / "metrics.jsonl").read_bytes()


def test_run_directory_holds_everything(tmp_path: Path) -> None:
    outcome = run_local(quick(tmp_path, num_server_rounds=6, train__epochs=2, pictures=True))
    names = {p.name for p in outcome.run_dir.iterdir()}
    assert names == {
        "config.toml", "versions.json", "metrics.jsonl", "timings.jsonl", "nodes.json", "summary.json", "checkpoint.safetensors",
        "model.safetensors", "accuracy.png", "gallery.png", "alignment.png", "alignment.json", "class_counts.png",
        "choices.json", "generator.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in metrics(outcome.run_dir).splitlines()]
    assert [row["round"] for row in rows] == list(range(7))
    assert outcome.summary["status"] == "completed"
    assert outcome.summary["final_accuracy"] == rows[-1]["accuracy"]
    assert all(len(row["clients"]) == 2 and row["num_examples"] == row["num_real"] for row in rows[1:])
    model = load_file(outcome.run_dir / "model.safetensors")
    assert all(np.isfinite(a).all() for a in model.values())


def test_a_client_logs_its_alignment_on_its_own_disk(tmp_path: Path) -> None:
    outcome = run_local(quick(tmp_path, fraction_train=1.0))
    log = tmp_path / "state" / "clients" / outcome.run_dir.name / "client-0001" / "alignment.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert len(rows[0]["norm_of_P"]) == 10 and max(rows[0]["norm_of_P"]) > 0
    assert 0 <= rows[-1]["synthetic_accuracy_without_P"] <= 1


def test_clients_in_parallel_share_one_generator(tmp_path: Path) -> None:
    """Two threads that load at once would leave torch's modules patched: then nothing could be trained any more."""
    prepare._load_once.cache_clear()
    settings = quick(tmp_path, generator__name="diffusion", num_server_rounds=1, data__num_private=60)
    assert run_local(settings, workers=4).summary["left_out"] == {}
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_same_seed_same_bytes_whatever_runs_in_parallel(tmp_path: Path) -> None:
    one = run_local(quick(tmp_path / "a"), workers=1)
    two = run_local(quick(tmp_path / "b"), workers=3, num_nodes=2)  # other folders, threads and nodes
    assert metrics(one.run_dir) == metrics(two.run_dir)
    other = run_local(quick(tmp_path / "c", seed=1))
    assert metrics(one.run_dir) != metrics(other.run_dir)


def test_second_run_generates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_local(quick(tmp_path))
    client._prepared.cache_clear()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was generated again")

    monkeypatch.setattr(PublicImages, "generate", never)
    summary = run_local(quick(tmp_path)).summary
    assert summary["status"] == "completed" and summary["not_prepared"] == {} == summary["left_out"]


def test_resumed_run_ends_with_the_metrics_of_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(tmp_path, num_server_rounds=7, checkpoint_every=2, balancing__replay_period=2)
    unbroken = run_local(settings)
    killed = run_and_kill(settings, monkeypatch, in_round=6)
    assert json.loads((killed / "summary.json").read_text())["status"] == "failed"
    assert len(metrics(killed).splitlines()) == 6  # rounds 0 to 5, of which 5 is after the last checkpoint
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6, "accu')  # a kill in the middle of a line
    resumed = run_local(settings | {"resume": str(killed)})
    assert resumed.run_dir == killed
    assert metrics(killed) == metrics(unbroken.run_dir)
    for name, array in load_file(unbroken.run_dir / "model.safetensors").items():
        np.testing.assert_array_equal(array, load_file(killed / "model.safetensors")[name])


def test_an_extended_run_that_is_killed_goes_on_to_its_new_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = quick(tmp_path, checkpoint_every=1), quick(tmp_path, checkpoint_every=1, num_server_rounds=6)
    run_dir = run_local(short).run_dir
    assert run_and_kill(long | {"resume": str(run_dir)}, monkeypatch, in_round=5) == run_dir
    with pytest.raises(ConfigError, match="num-server-rounds: got 3; the run to resume has 6, which may only be raised"):
        run_local(short | {"resume": str(run_dir)})
    assert run_local(long | {"resume": "auto"}).run_dir == run_dir
    assert metrics(run_dir) == metrics(run_local(long | {"output-dir": str(tmp_path / "unbroken")}).run_dir)


def test_a_deployment_draws_nothing_of_the_clients_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the server's machine happens to hold the clients' folders, as here."""
    monkeypatch.setattr(LocalGrid, "is_simulated", False)
    run_dir = run_local(quick(tmp_path, pictures=True)).run_dir
    assert {path.name for path in run_dir.glob("*.png")} == {"accuracy.png"} and not (run_dir / "alignment.json").exists()


def test_a_client_whose_memory_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(tmp_path, num_server_rounds=2, fraction_train=1.0)
    run_dir = run_local(settings).run_dir
    shutil.rmtree(tmp_path / "state" / "clients" / run_dir.name / "client-0002")
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    run_local(settings | {"num-server-rounds": 4, "resume": str(run_dir)})
    assert [line for line in lines if "afresh" in line] == [
        "Round 3: client 2 finds nothing of this run on its disk and starts afresh"
    ]


def test_clients_that_go_on_with_another_generator_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: in round 3, the first that is resumed, and not in round 4."""
    settings = quick(tmp_path, num_server_rounds=2, fraction_train=1.0)
    run_dir = run_local(settings).run_dir
    for forget in (client._prepared.cache_clear, prepare._load_once.cache_clear):
        forget()
    made = PublicImages.__init__

    def retrained(self: PublicImages, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        self.fingerprint = "another"

    monkeypatch.setattr(PublicImages, "__init__", retrained)
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    run_local(settings | {"num-server-rounds": 4, "resume": str(run_dir)})
    assert [line.split(":")[:2] for line in lines if "another generator" in line] == [
        ["Round 3", f" client {k} has synthetic images of another generator than before"] for k in range(4)
    ]
    for forget in (client._prepared.cache_clear, prepare._load_once.cache_clear):
        forget()


def test_resume_refuses_other_settings_and_damaged_checkpoints(tmp_path: Path) -> None:
    done = run_local(quick(tmp_path))
    with pytest.raises(ConfigError, match=r"train\.learning-rate: got 0\.5; the run to resume has 0\.1"):
        run_local(quick(tmp_path, resume=str(done.run_dir), train__learning_rate=0.5))
    with pytest.raises(StateError, match="is not the directory of a run"):
        run_local(quick(tmp_path, resume=str(tmp_path / "nowhere")))
    checkpoint = done.run_dir / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(StateError, match="checkpoint.safetensors is damaged"):
        run_local(quick(tmp_path, resume=str(done.run_dir), num_server_rounds=5))


def test_balancing_switched_off_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    off = {"balancing__filling": False, "balancing__sampling": "none", "balancing__alignment": False}
    fedavg = run_local(quick(tmp_path / "a", balancing__enabled=False))
    nothing = run_local(quick(tmp_path / "b", **off))
    assert metrics(fedavg.run_dir) == metrics(nothing.run_dir)


def test_batch_norms_counts_of_batches_do_not_tell_the_size_of_a_clients_set(tmp_path: Path) -> None:
    """Two clients of 30 images in batches of 32 take one batch each; what is sent says none. Checkpoints hold these single whole numbers."""
    settings = quick(
        tmp_path, model__name="resnet18", model__stem="32x32", model__norm="batch", data__num_private=60, data__partition="iid",
        num_clients=2, fraction_train=1.0, num_server_rounds=1, checkpoint_every=1, balancing__enabled=False,
    )  # fmt: skip
    run_dir = run_local(settings).run_dir
    counts = [array for name, array in load_file(run_dir / "model.safetensors").items() if name.endswith("num_batches_tracked")]
    assert len(counts) == 20 and all(count.shape == () and count == 0 for count in counts)
    resumed = run_local(settings | {"resume": str(run_dir), "num-server-rounds": 2})
    assert resumed.summary["status"] == "completed"


def test_empty_and_one_sample_clients_take_part(tmp_path: Path) -> None:
    outcome = run_local(quick(tmp_path, data__num_private=12, num_clients=8, data__alpha=0.05, fraction_train=1.0, seed=3))
    config = parse_config(quick(tmp_path, data__num_private=12, num_clients=8, data__alpha=0.05, seed=3))
    from fbl_flower.data.datasets import load_parts
    from fbl_flower.data.partition import partition

    sizes = [len(p) for p in partition(load_parts(config.data).private.labels.numpy(), config)]
    assert 0 in sizes and 1 in sizes
    assert outcome.summary["status"] == "completed" and outcome.summary["left_out"] == {}


def test_data_and_generator_that_are_both_missing_are_reported_together(tmp_path: Path) -> None:
    settings = quick(
        tmp_path, data__name="cifar10", data__path=str(tmp_path / "none.parquet"),
        generator__name="diffusion", generator__path=str(tmp_path / "no-generator"),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"none\.parquet[^\n]*\n[^\n]*no-generator"):
        run_local(settings)
    assert not (tmp_path / "runs").exists()


def _federate(tmp_path: Path, app: ClientApp, **overrides: Any) -> Path:
    config = quick(tmp_path, fraction_train=1.0, **overrides)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with LocalGrid(app, num_nodes=4, run_config=config) as grid:
        server.app(grid, context)
    return Path(str(context.state.config_records["run"]["directory"]))


def _app(train: Any) -> ClientApp:
    """A ClientApp that trains in its own way."""
    app = ClientApp()
    app.query("describe")(client.describe)
    app.train("prepare")(client.prepare)
    app.train()(train)
    return app


def test_a_client_that_is_not_finite_is_left_out_and_named(tmp_path: Path) -> None:
    def train(message: Message, context: Context) -> Message:
        request = Request.from_record(message.content)
        value = float("nan") if request.client == 2 else 1.0
        seconds = float("inf") if request.client == 1 else 0.0
        arrays = {name: np.full_like(a, value) for name, a in request.arrays.items()}
        reply = Reply(arrays=arrays, num_examples=3, num_real=3, loss=0.1, seconds=seconds)
        return Message(reply.to_record(), reply_to=message)

    run_dir = _federate(tmp_path, _app(train))
    row = json.loads(metrics(run_dir).splitlines()[-1])
    assert row["clients"] == [0, 3]
    assert row["left_out"] == dict.fromkeys(("1", "2"), "its model or its loss is not finite")
    assert all((a == 1).all() for a in load_file(run_dir / "model.safetensors").values())
    assert set(json.loads((run_dir / "summary.json").read_text())["left_out"]) == {"1", "2", "3"}


def test_an_answer_that_cannot_be_used_costs_the_client_its_round_and_nobody_else(tmp_path: Path) -> None:
    def train(message: Message, context: Context) -> Message:
        request = Request.from_record(message.content)
        arrays = {name: np.ones_like(a) for name, a in request.arrays.items()}
        if request.client == 1:
            arrays["head.bias"] = arrays["head.bias"][:-1]
        content = Reply(arrays=arrays, num_examples=3, num_real=3, loss=0.1, seconds=0.0).to_record()
        if request.client == 2:
            content["arrays"] = ConfigRecord({"w": 1})
        if request.client == 3:
            del content["metrics"]
        return Message(content, reply_to=message)

    run_dir = _federate(tmp_path, _app(train))
    row = json.loads(metrics(run_dir).splitlines()[-1])
    assert row["clients"] == [0]
    assert row["left_out"] == {
        "1": "its model has other arrays than the global one: expected head.bias as float32 of shape [10]",
        "2": "its answer cannot be read: arrays is no ArrayRecord",
        "3": "its answer cannot be read: expected the records arrays, metrics",
    }


def test_a_round_without_success_fails_the_run_with_the_reasons(tmp_path: Path) -> None:
    def train(message: Message, context: Context) -> Message:
        raise MemoryError(f"node {context.node_id}")

    with pytest.raises(RunFailed, match="round 1: no client succeeded: client 0: node 1; client 1: node 2"):
        _federate(tmp_path, _app(train))
    (run_dir,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "failed" and "client 3: node 4" in summary["reason"]


def test_a_client_that_does_not_answer_is_left_out(tmp_path: Path) -> None:
    forever = threading.Event()

    def train(message: Message, context: Context) -> Message:
        request = Request.from_record(message.content)
        if request.client == 3:
            forever.wait(60)
        return Message(
            Reply(arrays=request.arrays, num_examples=1, num_real=1, loss=0.0, seconds=0.0).to_record(), reply_to=message
        )

    config = quick(tmp_path, fraction_train=1.0, num_server_rounds=1, timeout=6.0, balancing__enabled=False)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with LocalGrid(_app(train), num_nodes=4, run_config=config, workers=4) as grid:
        server.app(grid, context)
        forever.set()
    run_dir = Path(str(context.state.config_records["run"]["directory"]))
    assert json.loads(metrics(run_dir).splitlines()[-1])["left_out"] == {"3": "no answer within 6 s"}
    timing = json.loads((run_dir / "timings.jsonl").read_text().splitlines()[-1])
    assert timing["client_seconds"].keys() == {"0", "1", "2"} and timing["waiting_seconds"]["3"] >= 6


def test_nodes_that_run_other_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fbl_flower.federation.node.code_fingerprint", lambda: "0" * 64)
    with pytest.raises(RunFailed, match="every node is refused: it runs other code than the server.*superlink stop"):
        run_local(quick(tmp_path))
    with pytest.raises(RunFailed, match="none of 4 nodes described itself as an FBL client: .*superlink stop"):
        _federate(tmp_path, ClientApp())


def test_a_client_tells_the_server_only_the_public_half_of_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise FBLError("no image of class 7", public="the fill failed")

    monkeypatch.setattr("fbl_flower.federation.client.prepare_client", broken)
    with pytest.raises(RunFailed) as failure:
        run_local(quick(tmp_path))
    assert "the fill failed" in str(failure.value) and "class 7" not in str(failure.value)
    assert "no image of class 7" in (tmp_path / "state" / "client-errors.log").read_text()


def test_very_skewed_clients_of_which_some_have_nothing(tmp_path: Path) -> None:
    settings = quick(tmp_path, num_clients=33, data__alpha=0.05, num_server_rounds=1, fraction_train=1.0)
    parts = load_parts(parse_config(settings).data)
    sizes = [len(prepare.client_examples(parse_config(settings), parts, k)) for k in range(33)]
    assert min(sizes) == 0 and sum(sizes) == 300
    row = json.loads(metrics(run_local(settings).run_dir).splitlines()[-1])
    assert row["num_real"] == 300 and row["left_out"] == {}


def test_averaged_embeddings_go_round(tmp_path: Path) -> None:
    settings = quick(tmp_path, balancing__average_embeddings=True, checkpoint_every=1, num_server_rounds=2)
    outcome = run_local(settings)
    checkpoint = load_file(outcome.run_dir / "checkpoint.safetensors")
    assert checkpoint["alignment-embeddings"].shape == (10, 32)
    assert np.abs(checkpoint["alignment-embeddings"]).max() > 0
    longer = run_local(settings | {"num-server-rounds": 3, "resume": str(outcome.run_dir)})
    straight = run_local(settings | {"num-server-rounds": 3})
    assert metrics(longer.run_dir) == metrics(straight.run_dir)


def test_wire_round_trip_keeps_names_dtypes_and_numbers() -> None:
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7, dtype=np.int64)}
    request = Request(
        run="r", client=3, server_round=4, checkpoint_round=2, last_round=1, arrays=arrays,
        embeddings=np.ones((2, 2), np.float32), extras={"fedgen": {"w": arrays["w"] + 1}},
    )  # fmt: skip
    back = Request.from_record(request.to_record())
    assert (back.run, back.client, back.server_round, back.checkpoint_round, back.last_round) == ("r", 3, 4, 2, 1)
    np.testing.assert_array_equal(back.extras["fedgen"]["w"], arrays["w"] + 1)
    for name in arrays:
        np.testing.assert_array_equal(back.arrays[name], arrays[name])
        assert back.arrays[name].dtype == arrays[name].dtype
    np.testing.assert_array_equal(back.embeddings, np.ones((2, 2)))
    vectors, extras = np.full((2, 2), 3, np.float32), {"scaffold": {"c": np.arange(3, dtype=np.float32)}}
    numbers = {"num_examples": 5, "num_real": 4, "loss": 0.25, "seconds": 1.5, "forgot": True, "other_generator": True}
    reply = Reply(arrays=arrays, **numbers, embeddings=vectors, extras=extras)
    answer = Reply.from_record(reply.to_record())
    assert {name: getattr(answer, name) for name in numbers} == numbers
    np.testing.assert_array_equal(answer.arrays["w"], arrays["w"])
    np.testing.assert_array_equal(answer.embeddings, vectors)
    assert answer.extras.keys() == {"scaffold"}
    np.testing.assert_array_equal(answer.extras["scaffold"]["c"], extras["scaffold"]["c"])
    sent = {"num-examples", "num-real", "train-loss", "seconds", "forgot", "other-generator"}
    assert set(reply.to_record().metric_records["metrics"]) == sent


def test_the_smallest_fraction_is_one_client() -> None:
    assert len(choose_clients(1e-11, list(range(10)), 1, seed=0)) == 1


def test_choose_clients_depends_on_seed_and_round_only() -> None:
    rounds = [choose_clients(0.5, list(range(10)), r, seed=0) for r in range(1, 40)]
    assert all(len(set(r)) == 5 and r == sorted(r) for r in rounds)
    assert {k for r in rounds for k in r} == set(range(10))
    assert rounds[0] == choose_clients(0.5, list(range(10)), 1, seed=0)
    for server_round in range(1, 40):  # nobody else is chosen only if there is nobody else
        (drawn,) = choose_clients(0.1, list(range(10)), server_round, seed=0)
        (other,) = choose_clients(0.1, list(range(10)), server_round, seed=0, unprepared={drawn})
        assert other != drawn
        assert choose_clients(0.1, list(range(10)), server_round, seed=0, unprepared={other, 11}) == [drawn]
        assert choose_clients(0.1, list(range(10)), server_round, seed=0, unprepared=set(range(10))) == [drawn]


def test_ask_reports_each_answer_and_keeps_order() -> None:
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("no")
        return Message(RecordDict(), reply_to=message)

    seen: list[tuple[int, int]] = []
    with LocalGrid(app, num_nodes=3, run_config={}) as grid:
        requests = {node: (node, RecordDict()) for node in (1, 2, 3)}
        answers = ask(
            grid, requests, "query.describe", read=lambda _, c: [c], timeout=10, progress=lambda a, b: seen.append((a, b))
        )
    assert list(answers.values) == [1, 3] and answers.failures == {2: "no"}
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_what_nobody_waits_for_any_more_is_not_worked_on() -> None:
    """Of three messages the first takes longer than all are waited for: the others have expired when their turn comes, and delay nothing."""
    app, worked = ClientApp(), list[int]()
    slow = threading.Event()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        worked.append(int(context.node_config["partition-id"]))
        slow.wait(1.5)
        return Message(RecordDict(), reply_to=message)

    requests = {node: (node, RecordDict()) for node in (1, 2, 3)}
    with LocalGrid(app, num_nodes=3, run_config={}) as grid:
        first = ask(grid, requests, "query.describe", read=lambda _, c: [c], timeout=0.5)
        assert first.values == {} and set(first.failures.values()) == {"no answer within 0.5 s"}
        slow.set()
        assert list(ask(grid, requests, "query.describe", read=lambda _, c: [c], timeout=30).values) == [1, 2, 3]
    assert worked == [0, 0, 1, 2]


def test_fingerprint_is_of_this_code() -> None:
    assert len(code_fingerprint()) == 64 and code_fingerprint() == code_fingerprint()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3), np.float64(1.5).reshape(()), np.zeros((0, 4), np.int64),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(12, dtype=np.uint8)[::3], np.array([True, False]),
    ],
)  # fmt: skip
def test_arrays_travel_as_flower_itself_packs_them(array: np.ndarray) -> None:
    ours, flowers = array_record({"x": array})["x"], Array(np.ascontiguousarray(array).reshape(array.shape))
    assert (ours.dtype, tuple(ours.shape), ours.stype) == (flowers.dtype, tuple(flowers.shape), flowers.stype)
    assert bytes(ours.data) == bytes(flowers.data)
    assert np.array_equal(ours.numpy(), array) and ours.numpy().dtype == array.dtype


def test_a_time_budget_is_spent_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of ten takes a second, and there are two: each client that lacks more notes the share, and no round makes another."""
    settings = quick(tmp_path, fraction_train=1.0, generator__time_budget=2.0, data__alpha=0.05)
    config, made, clock = parse_config(settings), [0], [0.0]
    inner = prepare.shared_generator(config)

    class Slow:
        fingerprint, batch_size = inner.fingerprint, 10

        def generate(self, labels: list[int], seeds: list[int]) -> torch.Tensor:
            clock[0] += bool(labels)
            made[0] += len(labels)
            return inner.generate(labels, seeds)

    monkeypatch.setattr(prepare, "shared_generator", lambda *_: Slow())
    for module in ("balancing.filling", "generation.cache"):
        monkeypatch.setattr(f"fbl_flower.{module}.time.monotonic", lambda: clock[0])
    whole = [prepare.client_plan(config, prepare.client_examples(config, load_parts(config.data), k), 10, k) for k in range(4)]
    wanted = [int(plan.fill.sum()) for plan in whole if plan is not None]
    assert min(wanted) > 20
    exchange = client._prepared
    monkeypatch.setattr(
        client, "_prepared", exchange.__wrapped__
    )  # as in a deployment, where each message has a process of its own
    monkeypatch.setattr(client, "forget_clients", lambda: None)
    outcome = run_local(settings)
    assert outcome.summary["status"] == "completed" and made[0] == 4 * 20
    for number, missing in enumerate(wanted):
        note = tmp_path / "state" / "clients" / outcome.run_dir.name / f"client-{number:04d}" / "time-budget-spent"
        assert note.read_text().startswith(f"{1 - 20 / missing:.4f} of the synthetic images are missing")
    rows = [json.loads(line) for line in metrics(outcome.run_dir).splitlines()]
    assert all(row["num_examples"] == row["num_real"] for row in rows[1:])  # the total stays
    run_local(settings)  # the next run goes on where this one stopped
    assert made[0] == sum(min(number, 40) for number in wanted)
