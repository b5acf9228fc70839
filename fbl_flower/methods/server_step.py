"""Server optimizers (Reddi et al., arXiv 2003.00295) and an exponential average of the global model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fbl_flower.config.server import ServerConfig
from fbl_flower.params import Arrays

ServerArrays = Mapping[str, Arrays]
MOMENTUM, VARIANCE, AVERAGE = (
    "server-momentum",
    "server-variance",
    "server-average",
)  # in the checkpoint; no methods, so sent to nobody


def server_step(
    before: Mapping[str, np.ndarray], mean: Arrays, state: ServerArrays, *, config: ServerConfig, parameters: Iterable[str]
) -> tuple[Arrays, dict[str, Arrays]]:
    """Return the model after the server's step from `before` towards `mean`, and the optimizer's new arrays.

    The pseudo-gradient is d = mean - before, of parameters; buffers are those of the mean.

    momentum (FedAvgM, arXiv 1909.06335): m <- beta1 m + d; x <- x + eta m.
    adam (FedAdam, Algorithm 2): m <- beta1 m + (1 - beta1) d; v <- beta2 v + (1 - beta2) d^2; x <- x + eta m / (sqrt(v) + tau). m starts at 0,
    v at tau^2, and there is no correction of the bias, as published.

    Args:
        before: The global model that the clients received.
        mean: What FedAvg would make of the round.
        state: The optimizer's arrays, by `MOMENTUM` and `VARIANCE`, then by name; empty before its first step.
        config: The server's settings.
        parameters: Names of the parameters.
    """
    after: Arrays = dict(mean)
    if config.optimizer == "none":
        return after, {}
    momentum: Arrays = {}
    variance: Arrays = {}
    for name in parameters:
        d = mean[name].astype(np.float64) - before[name]
        m = config.momentum * _of(state, MOMENTUM, name, np.zeros_like(d))
        if config.optimizer == "momentum":
            step = m = m + d
        else:
            m = m + (1 - config.momentum) * d
            v = config.beta2 * _of(state, VARIANCE, name, np.full_like(d, config.tau**2)) + (1 - config.beta2) * d**2
            step = m / (np.sqrt(v) + config.tau)
            variance[name] = v.astype(mean[name].dtype)
        momentum[name] = m.astype(mean[name].dtype)
        after[name] = (before[name] + config.learning_rate * step).astype(mean[name].dtype)
    return after, {MOMENTUM: momentum} | ({VARIANCE: variance} if variance else {})


def next_average(average: Mapping[str, np.ndarray], model: Arrays, *, decay: float, server_round: int) -> Arrays:
    """Return a average + (1 - a) model with a = min(decay, (1 + r) / (10 + r)), so that the first rounds count less later.

    Whole-number buffers are the model's.

    Args:
        average: After the last round.
        model: The global model after this round.
        decay: d, 0 .. 1.
        server_round: r, from 1.
    """
    a = min(decay, (1 + server_round) / (10 + server_round))
    return {
        name: array
        if np.issubdtype(array.dtype, np.integer)
        else (a * average[name].astype(np.float64) + (1 - a) * array).astype(array.dtype)
        for name, array in model.items()
    }


def _of(state: ServerArrays, kind: str, name: str, otherwise: np.ndarray) -> np.ndarray:
    return state[kind][name].astype(np.float64) if kind in state else otherwise
