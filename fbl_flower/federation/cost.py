"""What a round costs each client: bytes that travel, seconds of computing and of waiting."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Array, RecordDict

_NUMBER = 8  # bytes of a number in a message


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What was sent to and received from each client in one round.

    Attributes:
        sent: Bytes of the request, by client; of everyone to whom it went out, also of those who failed.
        received: Bytes of the answer, by client; an answer that is an error has none.
        elapsed: Seconds from sending to the answer, or to the end of the wait.
    """

    sent: dict[int, int]
    received: dict[int, int]
    elapsed: dict[int, float]

    def in_order(self) -> Traffic:
        """Return the same with clients in ascending order."""
        return Traffic(**{name: dict(sorted(by_client.items())) for name, by_client in vars(self).items()})

    def waiting(self, computing: dict[int, float]) -> dict[int, float]:
        """Return the seconds in which a client did not compute: on the way, in queues, starting processes.

        Args:
            computing: Seconds of those that succeeded; of others it is not known, and all the time counts as waiting.
        """
        return {client: max(seconds - computing.get(client, 0.0), 0.0) for client, seconds in self.elapsed.items()}


def payload_bytes(content: RecordDict) -> int:
    """Count the bytes of a message's content: arrays as they travel, 8 for a number, text as UTF-8, and all names.

    What Flower and gRPC add (addresses, hashes, frames; TLS) is not in it, so the number is the same on every engine and machine.
    """
    return sum(
        len(name.encode(errors="replace")) + _value_bytes(value)
        for record in content.values()
        for name, value in record.items()
    )


def _value_bytes(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, list):
        return sum(map(_value_bytes, value))
    return _NUMBER
