"""Send one request to each of several clients and collect the answers, whoever fails or is late."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

AWAY = "its node is not connected"
_FIRST_PAUSE, _LAST_PAUSE = 0.05, 1.0  # seconds between two looks for replies; a deployment's looks are HTTP requests


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What came back, each keyed like the requests and in ascending order.

    Attributes:
        contents: Of those that succeeded.
        failures: Reason, one line, of those that failed or did not answer in time.
        elapsed: Seconds from sending to the answer, or to the end of the wait, of those to whom the request went out.
    """

    contents: dict[int, RecordDict]
    failures: dict[int, str]
    elapsed: dict[int, float]


def is_simulated(grid: Grid) -> bool:
    """Whether the clients run beside the server, in Flower's simulation or in this process, and not on nodes of their own."""
    return type(grid).__name__ == "InMemoryGrid" or bool(getattr(grid, "is_simulated", False))  # Flower moves its modules


def ask(
    grid: Grid,
    requests: Mapping[int, tuple[int, RecordDict]],
    message_type: str,
    *,
    timeout: float,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Send every request and wait until all are answered or `timeout` seconds have passed.

    Args:
        grid: Flower's way to the nodes.
        requests: For each key (a client, or a node), the node's id and the content.
        message_type: One of `wire.DESCRIBE`, `wire.PREPARE`, `wire.TRAIN`.
        timeout: Also the time after which the messages themselves expire, so that a slow client does not work on old ones.
        progress: Called with (answers so far, requests) after each answer.
    """
    contents: dict[int, RecordDict] = {}
    failures: dict[int, str] = {}
    waiting: dict[str, int] = {}
    sent: dict[int, float] = {}
    elapsed: dict[int, float] = {}
    for key, (node, content) in requests.items():  # one at a time: of several, Flower does not tell which could not be sent
        ids = list(grid.push_messages([Message(content, dst_node_id=node, message_type=message_type, ttl=timeout)]))
        if ids and ids[0]:
            waiting[ids[0]], sent[key] = key, time.monotonic()
        else:
            failures[key] = "the message could not be sent"
    deadline, pause = time.monotonic() + timeout, _FIRST_PAUSE
    while waiting and time.monotonic() < deadline:
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            # An answer on behalf of a node that is gone carries the SuperLink's address: only the request tells whose it is.
            key = waiting.pop(reply.metadata.reply_to_message_id)
            elapsed[key] = time.monotonic() - sent[key]
            if reply.has_error():
                failures[key] = _reason(reply.error, timeout)
            else:
                contents[key] = reply.content
            if progress is not None:
                progress(len(contents) + len(failures), len(requests))
        if replies:
            pause = _FIRST_PAUSE
        elif waiting:
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)
    for key in waiting.values():
        failures[key], elapsed[key] = f"no answer within {timeout:g} s", time.monotonic() - sent[key]
    return Answers(
        contents=dict(sorted(contents.items())), failures=dict(sorted(failures.items())), elapsed=dict(sorted(elapsed.items()))
    )


def _reason(error: Error, timeout: float) -> str:
    """Say what happened in our words where Flower itself answers for a node, else give the node's own, without Flower's wrapping."""
    match error.code:
        case ErrorCode.MESSAGE_UNAVAILABLE | ErrorCode.REPLY_MESSAGE_UNAVAILABLE:  # it expired just before our own deadline
            return f"no answer within {timeout:g} s"
        case ErrorCode.NODE_UNAVAILABLE:
            return AWAY
        case ErrorCode.CLIENT_APP_CRASHED:
            return "its process ended without an answer"
    text = " ".join((error.reason or f"error {error.code}").split())
    start = text.find(":<'")
    return text[start + 3 : -2] if text.startswith("<class") and start >= 0 and text.endswith("'>") else text
