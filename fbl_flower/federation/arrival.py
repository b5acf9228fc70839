"""Fetch answers from Flower so that one that cannot be unpacked, or is not asked for, costs nobody else anything."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import Array, Message
from flwr.serverapp import Grid

UNREADABLE = "its answer cannot be read"
SMALL_ANSWER = 2**20  # bytes of arrays in an answer beyond those of its request: an honest one has no more than was sent to it
# What Flower raises on a message that is not well-formed. A broken connection is none of these.
_MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


class Arrivals:
    """The answers to requests, as they come.

    Flower's grid of a deployment forgets a batch of answers once it has fetched them, and raises if one of them cannot be unpacked: the
    others of the batch are then lost. So they are fetched one by one there.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._one_by_one = not is_simulated(grid)

    def of(self, limits: Mapping[str, int]) -> Iterator[tuple[str, Message | str]]:
        """Yield those of some requests that are answered, each once, with the answer or why it cannot be used.

        Args:
            limits: By the message id of each request, the most bytes of arrays in its answer; checked where answers are fetched one by one.
        """
        for batch in [[message_id] for message_id in limits] if self._one_by_one else [list(limits)]:
            open_ids = set(batch)
            try:
                with _inflated_at_most(limits[batch[0]]) if self._one_by_one else contextlib.nullcontext():
                    replies = list(self._grid.pull_messages(batch))
            except Exception as error:
                if not self._one_by_one or not _is_malformed(error):
                    raise
                yield batch[0], f"{UNREADABLE} ({type(error).__name__})"
                continue
            for reply in replies:
                message_id = reply.metadata.reply_to_message_id
                if message_id in open_ids:  # a sender writes this itself: it may be unknown, or come twice
                    open_ids.remove(message_id)
                    yield message_id, reply


def is_simulated(grid: Grid) -> bool:
    """Whether the clients run beside the server, in Flower's simulation or in this process, and not on nodes of their own."""
    return type(grid).__name__ == "InMemoryGrid" or bool(getattr(grid, "is_simulated", False))  # Flower moves its modules


def _is_malformed(error: Exception) -> bool:
    return isinstance(error, _MALFORMED) or type(error).__name__ in ("DecodeError", "UnexpectedObjectContentError")


@contextlib.contextmanager
def _inflated_at_most(limit: int) -> Iterator[None]:
    """Have Flower refuse arrays of more than `limit` bytes together before it puts their chunks into one.

    An array names its chunks by number, and may name one a million times: without this, a message of 1 MB becomes gigabytes.
    """
    original, left = Array.__dict__["inflate"], limit
    inflate = Array.inflate

    def bounded(object_content: bytes, children: dict[str, Any] | None = None) -> Array:
        nonlocal left
        sizes = [len(chunk.data) for chunk in (children or {}).values()]
        _, _, body = object_content.partition(b"\0")
        left -= sum(sizes[number] for number in json.loads(body)["arraychunk_ids"])
        if left < 0:
            raise ValueError(f"more than {limit} bytes of arrays")
        return inflate(object_content, children)

    Array.inflate = staticmethod(bounded)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Array.inflate = original  # type: ignore[method-assign]
