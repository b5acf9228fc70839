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
    learning_rate: float = option(1.0, "step size of the server optimizer", above=0.0, high=1e6)
    momentum: float = option(0.9, "momentum of the server optimizer; beta1 of adam", low=0.0, high=0.999)
    beta2: float = option(0.99, "adam: decay of the squared steps", low=0.0, high=0.9999)
    tau: float = option(1e-3, "adam: what is added to the root of the squared steps", above=0.0, high=1e6)
    average: float = option(
        0.0,
        "largest decay of an exponential average of the global model, which is evaluated beside it; 0: none",
        low=0.0,
        high=0.9999,
    )


@dataclass(frozen=True, kw_only=True)
class ServerTuningConfig:
    """Training of the global model on the server, on images of the run's generator; for every method."""

    part: str = option(
        "none", "what the server trains: nothing, the last layer on frozen features, or all", choices=("none", "head", "model")
    )
    every: int = option(
        0,
        "tune after every so many rounds, and go on from the tuned model; 0: only after the last round",
        low=0,
        high=1_000_000,
    )
    num_images: int = option(1000, "synthetic images, as many of each class", low=1, high=1_000_000_000)
    epochs: int = option(5, "passes over them in one tuning", low=1, high=10_000)
    learning_rate: float = option(0.0, "step size of the tuning; 0: train.learning-rate", low=0.0, high=1e6)

    @property
    def generates(self) -> bool:
        """Whether the server needs a generator."""
        return self.part != "none"

    def due(self, server_round: int, *, last: int) -> bool:
        """Whether the model is tuned after a round, of rounds 1 to `last`."""
        if self.part == "none" or server_round < 1:
            return False
        return server_round % self.every == 0 if self.every else server_round == last
