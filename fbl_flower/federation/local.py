"""The in-process engine: the same ServerApp and ClientApp, without Ray or server processes, for tests and sweeps."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fbl_flower.config import RunConfig, Value, flatten, parse_config
from fbl_flower.federation import client, server

WORKER = "fbl-client"  # the names of the threads in which clients run begin with it
_LONGEST_WAIT = 1.0  # seconds in which a look for replies comes back at the latest, so that a time-out is seen


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run: its directory, and what summary.json says."""

    run_dir: Path
    summary: dict[str, Any]


def run_local(run_config: Mapping[str, Value] | RunConfig, *, workers: int = 1, num_nodes: int | None = None) -> Outcome:
    """Run a federation in this process.

    Args:
        run_config: Run-config keys; those left out take their defaults.
        workers: Clients that run at the same time, in threads. Results do not depend on it.
        num_nodes: Nodes that host the clients; by default one for each client.

    Raises:
        FBLError: The run could not start, or failed.
    """
    config = run_config if isinstance(run_config, RunConfig) else parse_config(run_config)
    flat = flatten(config)
    client.forget_clients()  # files may have changed since an earlier run in this process
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(flat))
    with LocalGrid(client.app, num_nodes=num_nodes or config.num_clients, run_config=flat, workers=workers) as grid:
        server.app(grid, context)
    run_dir = Path(str(context.state.config_records["run"]["directory"]))
    return Outcome(run_dir=run_dir, summary=json.loads((run_dir / "summary.json").read_text(encoding="utf-8")))


class LocalGrid(Grid):
    """A Grid whose nodes are this process.

    Args:
        client_app: Answers every message.
        num_nodes: Each gets its partition-id and a context of its own, as in Flower's simulation.
        run_config: What the clients see as theirs.
        workers: Messages that are answered at the same time.
    """

    is_simulated = True

    def __init__(self, client_app: ClientApp, *, num_nodes: int, run_config: Mapping[str, Value], workers: int = 1) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._client_app = client_app
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node in range(1, num_nodes + 1)
        }
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=WORKER)
        self._numbers = itertools.count(1)
        self._pending: dict[str, Future[Message]] = {}

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)  # after a failure nobody waits for who is still at work

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Start answering; the messages' ids are numbers in the order of sending."""
        ids = []
        for message in messages:
            message_id = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = message_id  # as Flower's own in-memory grid does
            self._pending[message_id] = self._pool.submit(self._answer, message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return what is answered; wait, shortly, until something is."""
        asked = {i: self._pending[i] for i in message_ids if i in self._pending}
        wait(asked.values(), timeout=_LONGEST_WAIT, return_when=FIRST_COMPLETED)
        return [self._pending.pop(i).result() for i, future in asked.items() if future.done()]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting, replies = list(self.push_messages(messages)), list[Message]()
        while waiting:
            replies += self.pull_messages(waiting)
            waiting = [i for i in waiting if i in self._pending]
        return replies

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError("a LocalGrid has one run")

    @property
    def run(self) -> Any:
        raise NotImplementedError("a LocalGrid's run has no record")

    def _answer(self, message: Message) -> Message:
        if _expired(message):  # what waited behind slow clients is not worked on when nobody waits for it any more
            return _too_late(message)
        try:
            reply = self._client_app(message=message, context=self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # a node's failure is an answer, as in Flower's own engines
            return Message(Error(client.CLIENT_FAILED, f"{type(error)}:<'{error}'>"), reply_to=message)
        return _too_late(message) if _expired(message) else reply  # nobody fetches it: its model would stay in memory


def _expired(message: Message) -> bool:
    return time.time() > message.metadata.created_at + message.metadata.ttl


def _too_late(message: Message) -> Message:
    return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "the message has expired"), reply_to=message)
