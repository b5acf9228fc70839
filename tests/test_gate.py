"""Nothing that a client sends ends a run or spoils a checkpoint: it is used and does no harm, or the client is left out by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from helpers import quick
from hostile import RawAnswer, WireGrid, hostile_answers, raw_answer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.errors import RunFailed
from fbl_flower.federation import client, server
from fbl_flower.federation.arrival import Arrivals
from fbl_flower.federation.attendance import Attendance
from fbl_flower.federation.classification import Classification
from fbl_flower.federation.exchange import ask
from fbl_flower.federation.gate import Expected, one_line, read_description, read_prepared, read_reply
from fbl_flower.federation.generator_supply import GeneratorSupply
from fbl_flower.federation.generator_task import GeneratorTask
from fbl_flower.federation.local import LocalGrid
from fbl_flower.federation.method_rounds import roles_of
from fbl_flower.federation.roster import Member, Roster, call_roll
from fbl_flower.federation.rounds import Task, run_rounds
from fbl_flower.federation.transport import shrink
from fbl_flower.federation.wire import NodeDescription, Reply, array_record, code_fingerprint
from fbl_flower.methods.fedgen import LABEL_COUNTS
from fbl_flower.params import Arrays, capped
from fbl_flower.reporting.rundir import Checkpoint, RunDirectory

HOSTILE = 3  # the node that answers wrongly; nodes 1 and 2 are honest


def numbers(count: int) -> settings:
    return settings(max_examples=count, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])


def describe(node: int, **other: Any) -> NodeDescription:
    fields: dict[str, Any] = {"partition_id": node - 1, "num_partitions": 3, "code": code_fingerprint(), "name": f"n{node}"}
    return NodeDescription(**fields | other)


class Step:
    """One task of a run with three nodes that can be asked for its first round again and again."""

    def __init__(self, tmp_path: Path, *, generator: bool = False, examples: int = 110, **overrides: Any) -> None:
        self.examples = examples
        shared = {"num_clients": 3, "fraction_train": 1.0, "num_server_rounds": 1, "checkpoint_every": 1, "timeout": 0.1}
        self.config = config = parse_config(quick(tmp_path, **shared | overrides))
        self.run, parts = RunDirectory.create(config), load_parts(config.data)
        members = {node - 1: Member(node=node, description=describe(node)) for node in (1, 2, HOSTILE)}
        roster = Roster(num_clients=3, num_partitions=3, members=members)
        self.grid = WireGrid(members[k].node for k in members)
        attendance = Attendance(self.grid, self.run, roster)
        self.task: Task
        if generator:
            self.task = GeneratorTask(config, self.run, parts, attendance)
            self.rows, self.point = self.run.generator_rounds, self.task.start()
        else:
            self.task = Classification(
                config, self.run, parts, attendance, roles_of(config, roster), supply=GeneratorSupply("")
            )
            self.rows, self.point = self.run, self.task.first_point(0.0)
        self.attendance = attendance
        self.method = config.method.name
        self.noise = {name: np.random.default_rng(1).normal(0, 0.01, a.shape) for name, a in self.point.arrays.items()}

    def honest(self, node: int) -> RawAnswer:
        """Return what a client answers that moved each weight by about a hundredth."""
        before = self.point.arrays
        arrays = {name: (a + node * self.noise[name]).astype(a.dtype) for name, a in before.items()}
        extras: dict[str, Arrays] = {}
        if self.method == "scaffold":
            extras = {"scaffold": {name: np.full_like(a, 0.01) for name, a in arrays.items()}}
        if self.method == "fedgen":
            extras = {"fedgen": {LABEL_COUNTS: np.arange(10)}}
        vectors = self.point.embeddings
        reply = Reply(
            arrays=shrink(arrays, before, precision=self.config.transport.precision), num_examples=9, num_real=9, loss=1.5,
            seconds=0.5, extras=extras, embeddings=None if vectors is None else vectors + 1,
        )  # fmt: skip
        return raw_answer(reply.to_record())

    def outcome(self, hostile: RawAnswer) -> str:
        """Run the round with one hostile answer; return why it was left out, or nothing. Checks that no harm was done."""
        self.rows.cut_rows(0)
        self.grid.answer = lambda node, _: hostile if node == HOSTILE else self.honest(node)
        after = run_rounds(self.task, self.point, grid=self.grid, config=self.config, attendance=self.attendance)
        (row,) = [row for row in self.rows.read_rows("metrics.jsonl") if row["round"] == 1]
        stored = self.rows.read_checkpoint()
        check_unharmed(after, self.point)
        check_unharmed(stored, self.point)
        assert all(np.array_equal(stored.arrays[name], array) for name, array in after.arrays.items())
        assert set(row["clients"]) - {2} == {0, 1}
        reason: str = row["left_out"].get("2", "")
        assert (2 in row["clients"]) == (reason == "")
        check_reason(reason)
        return reason


def check_unharmed(after: Checkpoint, before: Checkpoint) -> None:
    forms = [{name: (a.shape, a.dtype) for name, a in point.arrays.items()} for point in (after, before)]
    assert forms[0] == forms[1]
    kept = [after.arrays, *after.method_state.values(), {} if after.embeddings is None else {"P": after.embeddings}]
    assert all(np.isfinite(array).all() for arrays in kept for array in arrays.values())
    assert before.embeddings is None or after.embeddings.shape == before.embeddings.shape  # type: ignore[union-attr]


def check_reason(reason: str) -> None:
    assert reason.isprintable() and len(reason) < 300


STEPS: dict[str, dict[str, Any]] = {
    "fedavg": {"balancing__average_embeddings": True},
    "scaffold": {"method__name": "scaffold", "transport__precision": "fp16", "server__optimizer": "adam", "server__average": 0.5},
    "fedgen": {"method__name": "fedgen", "fedgen__steps": 1, "aggregation__weight_by": "real"},
    "feddyn": {"method__name": "feddyn", "server__optimizer": "momentum", "balancing__enabled": False},
    "generator": {"generator": True, "examples": 20, "generator__name": "federated", "federated_generator__rounds": 1,
                  "federated_generator__fraction_train": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module", params=STEPS)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Step:
    return Step(tmp_path_factory.mktemp(request.param), **STEPS[request.param])


# -- fuzzing -------------------------------------------------------------------------------------------------------------------------


def test_honest_answers_are_taken(step: Step) -> None:
    assert step.outcome(step.honest(HOSTILE)) == ""


def test_a_round_survives_whatever_one_client_answers(step: Step) -> None:
    @numbers(step.examples)
    @given(answer=st.deferred(lambda: hostile_answers(step.honest(HOSTILE))))
    def check(answer: RawAnswer) -> None:
        step.outcome(answer)

    check()


MODEL = {"w": np.ones((2, 3), np.float32), "b": np.float32([0.5]), "n": np.array(7)}
EXPECTED = Expected(
    arrays=MODEL, embeddings=np.zeros((2, 2), np.float32), extras={"fedgen": {LABEL_COUNTS: np.arange(2)}}, counts_real=True
)
REPLY = Reply(
    arrays=MODEL, num_examples=3, num_real=3, loss=0.5, seconds=1.0, embeddings=np.ones((2, 2), np.float32),
    extras={"fedgen": {LABEL_COUNTS: np.array([1, 2])}},
)  # fmt: skip


def arrived(answer: RawAnswer) -> Message | str:
    grid = WireGrid([1])
    grid.answer = lambda *_: answer
    (message_id,) = grid.push_messages([Message(RecordDict(), dst_node_id=1, message_type="train", ttl=9)])
    found = dict(Arrivals(grid).of({message_id: 100_000}))
    return found.get(message_id, "not an answer to this request")


@numbers(1500)
@given(answer=hostile_answers(raw_answer(REPLY.to_record()), most=3))
def test_a_reply_is_what_was_asked_for_or_refused_in_one_line(answer: RawAnswer) -> None:
    message = arrived(answer)
    if isinstance(message, str) or message.has_error():
        return
    reply = read_reply(message.content, EXPECTED)
    if isinstance(reply, str):
        check_reason(reply)
        return
    assert {name: (a.shape, a.dtype) for name, a in reply.arrays.items()} == {
        name: (a.shape, a.dtype) for name, a in MODEL.items()
    }
    assert all(np.isfinite(array).all() for array in reply.arrays.values())
    assert 0 <= reply.num_examples == reply.num_real <= 10**9 and abs(reply.loss) <= 1e9


@numbers(400)
@given(answer=hostile_answers(raw_answer(describe(HOSTILE).to_record()), reply_to=False))
def test_the_roll_call_seats_the_others_whatever_one_node_says(answer: RawAnswer) -> None:
    grid = WireGrid([1, 2, HOSTILE])
    grid.answer = lambda node, _: answer if node == HOSTILE else raw_answer(describe(node).to_record())
    roster = call_roll(grid, num_clients=3, timeout=0.1)
    assert {0, 1} <= roster.members.keys() and roster.num_partitions == 3
    for member in roster.members.values():
        assert len(member.description.name) <= 64 and member.description.name.isprintable()


@numbers(200)
@given(answer=hostile_answers(raw_answer(RecordDict()), reply_to=False))
def test_preparing_ends_with_a_reason_for_whoever_answers_something_else(answer: RawAnswer) -> None:
    grid = WireGrid([1])
    grid.answer = lambda *_: answer
    answers = ask(grid, {0: (1, RecordDict())}, "train.prepare", read=lambda _, c: read_prepared(c), timeout=0.1)
    assert answers.values.keys() | answers.failures.keys() == {0}
    check_reason(answers.failures.get(0, ""))


# -- single cases --------------------------------------------------------------------------------------------------------------------


def changed(**other: Any) -> RecordDict:
    return replace(REPLY, **other).to_record()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (changed(num_examples=-1), "num-examples: expected a whole number from 0 to 1000000000"),
        (changed(num_examples=2), "num-examples: expected num-real, by aggregation.weight-by"),
        (changed(num_real=10**9 + 1), "num-real: expected a whole number from 0 to 1000000000"),
        (changed(loss=float("nan")), "its model or its loss is not finite"),
        (changed(seconds=1e300), "its training has diverged: a value of its model, or its loss, is beyond all bounds"),
        (changed(arrays=MODEL | {"b": np.float32([1e13])}), "its training has diverged: a value of its model, or its loss"),
        (changed(arrays=MODEL | {"n": np.array(-7)}), "a whole number of its answer is not from 0 to 1000000000"),
        (
            changed(arrays=MODEL | {"b": np.float64([1])}),
            "its model has other arrays than the global one: expected b as float32 of shape [1]",
        ),
        (changed(arrays=MODEL | {"x": np.float32(1)}), "its model has other arrays than the global one"),
        (changed(embeddings=np.ones((2, 3), np.float32)), "its alignment vectors are not those of the federation's classes"),
        (changed(extras={}), "it did not send the arrays of its method, fedgen"),
        (changed(extras={"fedgen": {LABEL_COUNTS: np.array([1, -2])}}), "a whole number of its answer is not from 0"),
        (RecordDict({"metrics": ConfigRecord()}), "it did not send the arrays of its method, fedgen"),
    ],
)
def test_what_is_wrong_with_a_reply_is_said_in_one_line(content: RecordDict, reason: str) -> None:
    found = read_reply(content, EXPECTED)
    assert isinstance(found, str) and found.startswith(reason)


def test_a_reply_that_fits_is_read_as_it_was_sent() -> None:
    reply = read_reply(REPLY.to_record(), EXPECTED)
    assert isinstance(reply, Reply)
    assert all(np.array_equal(reply.arrays[name], array) for name, array in MODEL.items())
    assert np.array_equal(reply.extras["fedgen"][LABEL_COUNTS], [1, 2]) and reply.num_real == 3
    without = read_reply(changed(embeddings=None), EXPECTED)
    assert isinstance(without, Reply) and without.embeddings is None
    halves = replace(EXPECTED, precision="fp16")
    assert isinstance(read_reply(REPLY.to_record(), halves), str)
    back = read_reply(changed(arrays=shrink(MODEL, MODEL, precision="fp16")), halves)
    assert isinstance(back, Reply) and np.array_equal(back.arrays["w"], MODEL["w"]) and back.arrays["w"].dtype == np.float32


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"num_partitions": 10**9}, "num-partitions: expected a whole number from 1 to 1000000"),
        ({"partition_id": 3}, "partition-id: expected a whole number from 0 to 2"),
        ({"partition_id": "x"}, "partition-id: expected a whole number from 0 to 2"),
        ({"partition_id": True}, "partition-id: expected a whole number from 0 to 2"),
        ({"name": "a\nforged line"}, "name: expected at most 64 printable characters"),
        ({"name": "x" * 65}, "name: expected at most 64 printable characters"),
        ({"code": "other"}, "code: expected 64 hexadecimal digits"),
    ],
)
def test_what_is_wrong_with_a_description_is_said_in_one_line(other: dict[str, Any], reason: str) -> None:
    assert read_description(describe(1, **other).to_record()) == reason
    assert isinstance(read_description(describe(1).to_record()), NodeDescription)


def test_text_from_elsewhere_becomes_one_short_printable_line() -> None:
    assert one_line(" a\n\tb\x1b[31m ") == "a b?[31m"
    assert one_line("ab" * 10**6, 5) == "abab…"
    assert one_line("x" * 280) == "x" * 280 and len(one_line("x" * 281)) == 280


def test_a_small_message_cannot_become_a_large_array() -> None:
    """An array that names its one chunk a million times."""
    answer = raw_answer(REPLY.to_record())
    arrays = answer.records["arrays"]
    assert isinstance(arrays, dict)
    arrays["w"].chunks = [0] * 1_000_000
    assert arrived(answer) == "its answer cannot be read (ValueError)"
    assert isinstance(
        arrived(raw_answer(REPLY.to_record())), Message
    )  # what was put in Flower's place is gone, or lets it pass
    assert isinstance(array_record(MODEL)["w"].inflate, object)


def test_a_broken_connection_is_no_clients_fault() -> None:
    class Gone(WireGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            raise ConnectionError("the server is gone")

    with pytest.raises(ConnectionError):
        ask(Gone([1]), {0: (1, RecordDict())}, "train", read=lambda _, c: [c], timeout=0.1)


def test_a_model_that_alone_spoils_the_mean_costs_its_client_the_round(tmp_path: Path) -> None:
    """Finite weights of 1e11: the mean of three has a loss beyond all bounds, that of the other two does not."""
    step = Step(tmp_path)
    hostile, arrays = step.honest(HOSTILE), {name: (1e11 * a).astype(a.dtype) for name, a in step.point.arrays.items()}
    hostile.records["arrays"] = raw_answer(RecordDict({"arrays": array_record(arrays)})).records["arrays"]
    assert step.outcome(hostile) == "its model has a loss that is not finite, or beyond 1e+09"
    arrays["head.weight"][:] = arrays["head.bias"][:] = 0  # so that its own loss is that of a guess
    hostile.records["arrays"] = raw_answer(RecordDict({"arrays": array_record(arrays)})).records["arrays"]
    assert "moved more than 100 times as far as others" in step.outcome(hostile)


@pytest.mark.parametrize(
    ("text", "reason"), [("\t", "error 2"), ("<class 'E'>:<' '>", "error 2"), ("<class 'E'>:<'no'>", "no")]
)
def test_an_error_without_words_is_named_by_its_number(text: str, reason: str) -> None:
    grid = WireGrid([1])
    grid.answer = lambda *_: RawAnswer({}, error=Error(2, text))
    answers = ask(grid, {0: (1, RecordDict())}, "train", read=lambda _, c: [c], timeout=1)
    assert answers.failures == {0: reason}


def test_a_forged_error_text_is_one_line_in_log_and_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = ClientApp()
    app.query("describe")(client.describe)
    app.train("prepare")(client.prepare)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_id == 2:
            return Message(Error(2, "disk full\nWARNING: all is well" + "!" * 10**6), reply_to=message)
        return client.train(message, context)

    config = quick(tmp_path, num_clients=2, num_server_rounds=1, fraction_train=1.0)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with LocalGrid(app, num_nodes=2, run_config=config) as grid:
        server.app(grid, context)
    (run_dir,) = (tmp_path / "runs").iterdir()
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["left_out"]["1"].startswith("disk full WARNING: all is well!!") and len(row["left_out"]["1"]) == 280
    assert not any("\n" in message for message in caplog.messages)


def test_a_run_in_which_all_diverge_still_fails_by_name(tmp_path: Path) -> None:
    step = Step(tmp_path)
    far = {name: (1e11 * a).astype(a.dtype) for name, a in step.point.arrays.items()}
    reply = Reply(arrays=far, num_examples=1, num_real=1, loss=1.0, seconds=0.0).to_record()
    step.grid.answer = lambda *_: raw_answer(reply)
    with pytest.raises(RunFailed, match="diverged"):
        run_rounds(step.task, step.point, grid=step.grid, config=step.config, attendance=step.attendance)


# -- weights -------------------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 10**9).map(float), min_size=1, max_size=8),
    st.floats(0.05, 0.99),
)
def test_no_client_weighs_more_than_the_largest_share(weights: list[float], share: float) -> None:
    after = capped(weights, largest_share=share)
    some = sum(weight > 0 for weight in weights)
    assert [weight > 0 for weight in after] == [weight > 0 for weight in weights]
    if some:
        assert max(after) / sum(after) <= max(share, 1 / some) + 1e-9
        assert sorted(range(len(weights)), key=lambda k: (after[k], weights[k])) == sorted(
            range(len(weights)), key=lambda k: (weights[k], weights[k])
        )
    assert capped(weights, largest_share=1.0) == weights


def test_what_is_cut_off_goes_to_the_others() -> None:
    assert capped([1.0, 1.0, 1.0, 1e9], largest_share=0.4) == pytest.approx([1, 1, 1, 2])
    assert capped([5.0, 3.0, 0.0], largest_share=0.5) == [1.0, 1.0, 0.0]


def test_a_client_that_claims_a_billion_images_gets_the_largest_share(tmp_path: Path) -> None:
    moved = []
    for share in (1.0, 0.4):
        step = Step(tmp_path / str(share), aggregation__largest_share=share)
        hostile = step.honest(HOSTILE)
        hostile.records["metrics"].update({"num-examples": 10**9})
        step.outcome(hostile)
        after, before = step.run.read_checkpoint().arrays["head.bias"], step.point.arrays["head.bias"]
        moved.append(float(np.median((after - before) / step.noise["head.bias"])))
    assert moved == pytest.approx([3.0, 0.4 * 3 + 0.3 * (1 + 2)], rel=1e-3)
