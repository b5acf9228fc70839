"""The learning rate over the rounds of a run, or the epochs of a training without a federation."""

from __future__ import annotations

import math
from dataclasses import replace

from fbl_flower.config import RunConfig

_RISE = 0.3  # share of the training in which one-cycle rises (Smith and Topin, arXiv 1708.07120)
_START = 0.04  # of the peak, where the rise begins


def rate_factor(schedule: str, progress: float) -> float:
    """Return the factor of the learning rate.

    constant: 1. cosine: (1 + cos(pi p)) / 2. one-cycle: from 0.04 to 1 in a straight line while p < 0.3, then the cosine to zero.

    Args:
        schedule: `train.schedule`.
        progress: p, the share of the training that is done, 0 .. 1.
    """
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return _cosine(progress)
        case "one-cycle":
            if progress < _RISE:
                return _START + (1 - _START) * progress / _RISE
            return _cosine((progress - _RISE) / (1 - _RISE))
        case _:
            raise ValueError(f"train.schedule: expected constant | cosine | one-cycle, got {schedule!r}")


def epoch_factors(schedule: str, epochs: int) -> list[float]:
    """Return the factor of each epoch of a training without a federation, taken in the epoch's middle."""
    return [rate_factor(schedule, (epoch + 0.5) / epochs) for epoch in range(epochs)]


def scheduled(config: RunConfig, server_round: int) -> RunConfig:
    """Return the settings of one round: every learning rate of the clients times the factor in the round's middle.

    It depends on the round and `num-server-rounds` alone, so a resumed run has the rates of an unbroken one.

    Args:
        config: Of a client, as its role has it.
        server_round: From 1.
    """
    factor = rate_factor(config.train.schedule, min(1.0, (server_round - 0.5) / config.num_server_rounds))
    if factor == 1:
        return config
    return replace(
        config,
        train=replace(config.train, learning_rate=config.train.learning_rate * factor),
        balancing=replace(config.balancing, embedding_learning_rate=config.balancing.embedding_learning_rate * factor),
        scaffold=replace(config.scaffold, learning_rate=config.scaffold.learning_rate * factor),
    )


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2
