"""Send one request to each of several clients and collect the answers, whoever fails or is late."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

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
                failures[key] = one_line(reply.error.reason or f"error {reply.error.code}")
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


def one_line(reason: str) -> str:
    """Strip Flower's wrapping, "<class 'x'>:<'reason'>", where it is there."""
    text = " ".join(reason.split())
    start = text.find(":<'")
    return text[start + 3 : -2] if text.startswith("<class") and start >= 0 and text.endswith("'>") else text
