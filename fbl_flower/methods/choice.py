"""From a method's name to the object that serves one client's round."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fbl_flower.config import RunConfig
from fbl_flower.config.methods import METHODS
from fbl_flower.errors import ConfigError
from fbl_flower.methods.base import LocalMethod, State
from fbl_flower.methods.fedavg import FEDAVG
from fbl_flower.methods.feddyn import FedDyn
from fbl_flower.methods.fedgen import FedGen
from fbl_flower.methods.fedprox import FedProx
from fbl_flower.methods.logits import LogitOffsets, fedlc, logit_adjustment
from fbl_flower.methods.moon import Moon
from fbl_flower.methods.scaffold import Scaffold
from fbl_flower.seeding import torch_stream


def local_method(
    name: str,
    config: RunConfig,
    *,
    client: int,
    server_round: int,
    received: Mapping[str, np.ndarray],
    state: State | None,
) -> LocalMethod:
    """Make the objective of one client in one round.

    Args:
        name: One of `METHODS`.
        config: Its `seed` and the method's own section.
        client: Names the random stream, with `server_round`.
        server_round: From 1.
        received: The method's arrays from the server; none for a method that has none.
        state: What the client remembers of the method; None in its first round.
    """
    match name:
        case "fedavg":
            return FEDAVG
        case "fedprox":
            return FedProx(mu=config.fedprox.mu)
        case "moon":
            return Moon(mu=config.moon.mu, temperature=config.moon.temperature, previous=state)
        case "scaffold":
            return Scaffold(learning_rate=config.scaffold.learning_rate, server_variate=received, client_variate=state)
        case "fedgen":
            rng = torch_stream(config.seed, "fedgen", client, server_round)
            return FedGen(weight=config.fedgen.latent_weight, received=received, rng=rng)
        case "logit-adjustment":
            return LogitOffsets(logit_adjustment(tau=config.logit_adjustment.tau))
        case "fedlc":
            return LogitOffsets(fedlc(tau=config.fedlc.tau))
        case "feddyn":
            return FedDyn(alpha=config.feddyn.alpha, state=state)
        case _:
            raise ConfigError([f"method.name: got {name!r}; allowed: {' | '.join(METHODS)}"])
