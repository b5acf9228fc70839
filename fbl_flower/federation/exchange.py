"""Send one request to each of several clients and collect the checked answers; clients that fail or are late are named."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fbl_flower.federation.arrival import SMALL_ANSWER, UNREADABLE, Arrivals
from fbl_flower.federation.cost import Traffic, payload_bytes
from fbl_flower.federation.gate import one_line

AWAY = "its node is not connected"
_FIRST_PAUSE, _LAST_PAUSE = 0.05, 1.0  # seconds between two looks for replies; a deployment's looks are HTTP requests
_LONGEST_ERROR = 10_000  # characters of a client's error that are looked at
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Answers(Generic[T]):
    """What came back, keyed like the requests and in ascending order.

    Attributes:
        values: Of those that succeeded, as they were read.
        failures: Reason, one printable line, of those that failed, did not answer in time, or answered what cannot be used.
        traffic: Of those to whom the request went out.
    """

    values: dict[int, T]
    failures: dict[int, str]
    traffic: Traffic


def ask(
    grid: Grid,
    requests: Mapping[int, tuple[int, RecordDict]],
    message_type: str,
    *,
    read: Callable[[int, RecordDict], T | str],
    timeout: float,
    progress: Callable[[int, int], None] | None = None,
) -> Answers[T]:
    """Send every request and wait until all are answered or `timeout` seconds have passed.

    Args:
        grid: Flower's way to the nodes.
        requests: For each key (a client, or a node), the node's id and the content.
        message_type: One of `wire.DESCRIBE`, `wire.PREPARE`, `wire.TRAIN`.
        read: Makes a value of a key's answer, or says in one line why it cannot be used (`gate`).
        timeout: Also the time after which the messages themselves expire, so that a slow client does not work on old ones.
        progress: Called with (answers so far, requests) after each answer.
    """
    values: dict[int, T] = {}
    failures: dict[int, str] = {}
    waiting: dict[str, int] = {}
    sent: dict[int, float] = {}
    traffic = Traffic(sent={}, received={}, elapsed={})
    for key, (node, content) in requests.items():  # one at a time: of several, Flower does not tell which could not be sent
        ids = list(grid.push_messages([Message(content, dst_node_id=node, message_type=message_type, ttl=timeout)]))
        if ids and ids[0]:
            waiting[ids[0]], sent[key] = key, time.monotonic()
            traffic.sent[key] = payload_bytes(content)
        else:
            failures[key] = "the message could not be sent"
    deadline, pause = time.monotonic() + timeout, _FIRST_PAUSE
    arrivals = Arrivals(grid)
    while waiting and time.monotonic() < deadline:
        answered = False
        limits = {message_id: traffic.sent[key] + SMALL_ANSWER for message_id, key in waiting.items()}
        for message_id, answer in arrivals.of(limits):
            # An answer on behalf of a node that is gone carries the SuperLink's address: only the request tells whose it is.
            answered, key = True, waiting.pop(message_id)
            traffic.elapsed[key] = time.monotonic() - sent[key]
            if isinstance(answer, str):
                failures[key] = answer
            elif answer.has_error():
                failures[key] = _reason(answer.error, timeout)
            else:
                traffic.received[key] = payload_bytes(answer.content)
                value = _read(read, key, answer.content)
                if isinstance(value, str):
                    failures[key] = one_line(value)
                else:
                    values[key] = value
            if progress is not None:
                progress(len(values) + len(failures), len(requests))
        if answered:
            pause = _FIRST_PAUSE
        elif waiting:
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)
    for key in waiting.values():
        failures[key], traffic.elapsed[key] = f"no answer within {timeout:g} s", time.monotonic() - sent[key]
    return Answers(values=dict(sorted(values.items())), failures=dict(sorted(failures.items())), traffic=traffic.in_order())


def _read(read: Callable[[int, RecordDict], T | str], key: int, content: RecordDict) -> T | str:
    """Read one answer. A case that the reader does not foresee costs this client its turn, not everyone the run."""
    try:
        return read(key, content)
    except Exception as error:
        return f"{UNREADABLE} ({type(error).__name__})"


def _reason(error: Error, timeout: float) -> str:
    """Say what happened in our words where Flower itself answers for a node, else give the node's own, without Flower's wrapping."""
    match error.code:
        case ErrorCode.MESSAGE_UNAVAILABLE | ErrorCode.REPLY_MESSAGE_UNAVAILABLE:  # it expired just before our own deadline
            return f"no answer within {timeout:g} s"
        case ErrorCode.NODE_UNAVAILABLE:
            return AWAY
        case ErrorCode.CLIENT_APP_CRASHED:
            return "its process ended without an answer"
    text = " ".join((error.reason or "")[:_LONGEST_ERROR].split())
    start = text.find(":<'")
    inner = text[start + 3 : -2] if text.startswith("<class") and start >= 0 and text.endswith("'>") else text
    return one_line(inner) or f"error {error.code}"
