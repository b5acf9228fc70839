"""Settings of what the server does with the mean of the clients' models."""

from __future__ import annotations

from dataclasses import dataclass

from fbl_flower.config.options import option


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The server's step towards the mean of the clients' models, and an average of the global model over rounds."""

    optimizer: str = option(
        "none",
        "server optimizer: momentum is FedAvgM (arXiv 1909.06335), adam is FedAdam (arXiv 2003.00295)",
        choices=("none", "momentum", "adam"),
    )
    learning_rate: float = option(1.0, "step size of the server optimizer", above=0.0)
    momentum: float = option(0.9, "momentum of the server optimizer; beta1 of adam", low=0.0, high=0.999)
    beta2: float = option(0.99, "adam: decay of the squared steps", low=0.0, high=0.9999)
    tau: float = option(1e-3, "adam: what is added to the root of the squared steps", above=0.0)
    average: float = option(
        0.0,
        "largest decay of an exponential average of the global model, which is evaluated beside it; 0: none",
        low=0.0,
        high=0.9999,
    )
