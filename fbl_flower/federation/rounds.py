"""The loop of rounds, the same for whatever is trained together: choose, ask, leave out by name, average, record.

What is trained is a `Task`: the classifier (`classification`), or before it the generator (`generator_task`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from logging import WARNING
from typing import Protocol

import numpy as np
from flwr.app import RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fbl_flower.config import RunConfig, rounded_up
from fbl_flower.errors import RunFailed
from fbl_flower.federation.attendance import Attendance
from fbl_flower.federation.cost import Traffic
from fbl_flower.federation.exchange import ask
from fbl_flower.federation.gate import Expected, read_reply
from fbl_flower.federation.wire import Reply
from fbl_flower.reporting.rundir import Checkpoint
from fbl_flower.seeding import numpy_stream


@dataclass(frozen=True, kw_only=True)
class Round:
    """What the clients' part of a round came to.

    Attributes:
        replies: By client, in ascending order; at least one, but for the initial model.
        failures: Why others are left out, by client.
        chosen: All that were asked.
        traffic: What travelled.
        seconds: Time that it took.
    """

    replies: dict[int, Reply]
    failures: dict[int, str]
    chosen: list[int] = field(default_factory=list)
    traffic: Traffic
    seconds: float

    def metrics(self) -> dict[str, object]:
        """Return what `metrics.jsonl` tells of the clients."""
        replies = self.replies.values()
        num_examples = sum(r.num_examples for r in replies)
        return {
            "train_loss": sum(r.loss * r.num_examples for r in replies) / num_examples if num_examples else None,
            "num_examples": num_examples,
            "num_real": sum(r.num_real for r in replies),
            "clients": list(self.replies),
            "left_out": {str(client): reason for client, reason in self.failures.items()},
            "bytes_to_clients": sum(self.traffic.sent.values()),
            "bytes_from_clients": sum(self.traffic.received.values()),
        }

    def timings(self) -> dict[str, object]:
        """Return what `timings.jsonl` tells of the clients."""
        computing = {client: reply.seconds for client, reply in self.replies.items()}
        return {
            "client_seconds": computing,
            "waiting_seconds": self.traffic.waiting(computing),
            "bytes_to_client": self.traffic.sent,
            "bytes_from_client": self.traffic.received,
        }


class Task(Protocol):
    """What the clients train together.

    Attributes:
        title: "Round", or what a round of it is called in the log.
        message_type: Of its requests, one of `wire`'s.
        rounds: How many there are.
    """

    title: str
    message_type: str
    rounds: int

    def begin(self, point: Checkpoint) -> Checkpoint:
        """Take in who has come since the last round."""
        ...

    def choose(self, clients: list[int], server_round: int) -> list[int]:
        """Choose the clients of a round among those whose nodes are connected."""
        ...

    def requests(self, chosen: list[int], point: Checkpoint, server_round: int, checkpoint_round: int) -> dict[int, RecordDict]:
        """Return what to ask of each."""
        ...

    def expected(self, client: int, point: Checkpoint) -> Expected:
        """Return what a client's answer must hold."""
        ...

    def advance(self, point: Checkpoint, result: Round, server_round: int) -> Checkpoint:
        """Make the next global model and record the round."""
        ...

    def save(self, point: Checkpoint) -> None:
        """Write a checkpoint."""
        ...


def run_rounds(task: Task, point: Checkpoint, *, grid: Grid, config: RunConfig, attendance: Attendance) -> Checkpoint:
    """Run the rounds that are left after `point`, with a checkpoint every few, and return the last one.

    Raises:
        RunFailed: In a round no client succeeded, none was connected in time, or the training diverged.
    """
    checkpoint_round = point.server_round
    for server_round in range(point.server_round + 1, task.rounds + 1):
        attendance.renew(server_round, timeout=config.timeout)
        point = task.begin(point)
        started = time.perf_counter()
        node_of = attendance.roster.node_of
        chosen = task.choose(attendance.present(), server_round)
        contents = task.requests(chosen, point, server_round, checkpoint_round)
        requests = {client: (node_of[client], content) for client, content in contents.items()}
        expected = {client: task.expected(client, point) for client in chosen}

        def read(client: int, content: RecordDict, expected: Mapping[int, Expected] = expected) -> Reply | str:
            return read_reply(content, expected[client])

        answers = ask(grid, requests, task.message_type, read=read, timeout=config.timeout)
        replies, failures = answers.values, attendance.away() | answers.failures
        failures = dict(sorted(failures.items()))
        for client, reason in failures.items():
            log(WARNING, "%s %d: client %d is left out: %s", task.title, server_round, client, reason)
        if not replies:
            raise RunFailed(f"{task.title.lower()} {server_round}: no client succeeded: " + reasons(failures))
        seconds = time.perf_counter() - started
        result = Round(replies=replies, failures=failures, chosen=chosen, traffic=answers.traffic, seconds=seconds)
        point = task.advance(point, result, server_round)
        if server_round % config.checkpoint_every == 0 or server_round == task.rounds:
            task.save(point)
            checkpoint_round = server_round
    return point


def choose_clients(
    fraction: float,
    clients: list[int],
    server_round: int,
    *,
    seed: int,
    stream: str = "clients",
    unprepared: Set[int] = frozenset(),
) -> list[int]:
    """Choose the clients of a round: ceil(fraction * all) of them, uniformly, from the run's seed alone.

    Those that are not prepared are chosen too, since what keeps them may have been mended; a draw of nobody else is made again, as long as
    somebody else is there: a run is not to end, in the same round again when it is resumed, for a client that cannot take part.
    """
    number = max(1, rounded_up(fraction, len(clients)))
    rng = numpy_stream(seed, stream, server_round)
    while True:
        chosen = sorted(rng.choice(np.array(clients), size=number, replace=False).tolist())
        if not set(chosen) <= unprepared or set(clients) <= unprepared:
            return chosen


def reasons(failures: Mapping[int, str]) -> str:
    """Put the reasons of several clients into one line."""
    return "; ".join(f"client {client}: {reason}" for client, reason in sorted(failures.items())) or "nobody answered"
