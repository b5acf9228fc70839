"""Settings of the federation as machines that may fail: how long to wait, for how many, and what travels."""

from __future__ import annotations

from dataclasses import dataclass

from fbl_flower.config.options import option


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How long the server waits for clients at the start, and how many it must have."""

    timeout: float = option(
        3600.0,
        "seconds that the nodes have to come, and then their clients to get ready; who comes later joins a later round",
        above=0.0,
        high=1e8,
    )
    quorum: float = option(
        0.0, "share of the clients that must be ready before round 1, and at least one; else the run fails", low=0.0, high=1.0
    )


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """How a client's model travels back to the server."""

    precision: str = option(
        "fp32",
        "fp16: a client sends what training changed, rounded to 16 bits, in place of the whole model",
        choices=("fp32", "fp16"),
    )
