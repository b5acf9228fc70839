"""Clients that play attackers (`attack`): wrong labels, or a poisoned model in place of the trained one. For experiments only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fbl_flower.config import RunConfig
from fbl_flower.data.examples import Examples
from fbl_flower.params import Arrays
from fbl_flower.seeding import numpy_stream


def attackers(config: RunConfig) -> list[int]:
    """Return the clients that attack, in ascending order. More attackers include the fewer, under the same seed."""
    order = numpy_stream(config.seed, "attackers").permutation(config.num_clients)
    return sorted(order[: config.attack.num_clients].tolist())


def with_hostile_labels(config: RunConfig, examples: Examples, num_classes: int, client: int) -> Examples:
    """Return a client's images; an attacker by label-flip takes class c for C - 1 - c."""
    if config.attack.kind != "label-flip" or client not in attackers(config):
        return examples
    return replace(examples, labels=num_classes - 1 - examples.labels)


def sent_model(
    received: Mapping[str, np.ndarray], trained: Arrays, config: RunConfig, *, client: int, server_round: int
) -> Arrays:
    """Return the model that a client sends: the trained one, or that of an attacker.

    With w the received model, u the update over all floating-point numbers, and s `attack.strength`:

    - scale: w + s u;
    - sign-flip: w - u;
    - noise: w + u + s |u| z / sqrt(d), with z ~ N(0, I) of d numbers, so that the noise has about s times the norm of u.
    """
    attack = config.attack
    if attack.kind in ("none", "label-flip") or client not in attackers(config):
        return trained
    update = {
        name: array.astype(np.float64) - received[name]
        for name, array in trained.items()
        if np.issubdtype(array.dtype, np.floating)
    }
    if attack.kind == "noise":
        rng = numpy_stream(config.seed, "attack", client, server_round)
        deviation = attack.strength * np.sqrt(
            sum(np.square(u).sum() for u in update.values()) / max(1, sum(u.size for u in update.values()))
        )
        poisoned = {name: u + rng.normal(0.0, deviation, u.shape) for name, u in update.items()}
    else:
        factor = attack.strength if attack.kind == "scale" else -1.0
        poisoned = {name: factor * u for name, u in update.items()}
    return trained | {name: (received[name] + u).astype(trained[name].dtype) for name, u in poisoned.items()}
