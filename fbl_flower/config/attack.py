"""Settings of simulated attacks, and what does not work with a robust rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fbl_flower.config.options import option
from fbl_flower.config.privacy import NOT_PRIVATE
from fbl_flower.config.sections import AggregationConfig

NOT_ROBUST = NOT_PRIVATE  # the server of these also works with what single clients sent, next to the mean
ATTACKS = ("none", "scale", "sign-flip", "label-flip", "noise")


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Clients that play attackers, for experiments (docs/methods.md). A node with images of its own refuses such a run."""

    kind: str = option(
        "none", "what they send in place of their model, or label-flip: labels c become C - 1 - c", choices=ATTACKS
    )
    num_clients: int = option(0, "how many clients; the seed draws which", low=0, high=100_000)
    strength: float = option(
        10.0, "scale: factor of the update; noise: norm of the noise, in norms of the update", above=0.0, high=1e6
    )


def rule_problems(
    aggregation: AggregationConfig,
    *,
    cohorts: Mapping[str, int],
    methods: set[str],
    average_embeddings: bool,
    private: bool,
) -> list[tuple[tuple[str, ...], str]]:
    """Name what does not work with `aggregation.rule`, each problem with the keys that it is about.

    Args:
        aggregation: The settings.
        cohorts: How many clients a round has, by the setting that says so.
        methods: Of all clients, as the configuration has them.
        average_embeddings: Whether clients send alignment vectors.
        private: Whether updates are clipped for privacy.
    """
    found: list[tuple[tuple[str, ...], str]] = []
    rule = aggregation.rule
    if rule == "mean":
        return found
    if private:
        text = (
            f"aggregation.rule: expected 'mean' with privacy.clip-norm, got {rule!r}: the noise is for a sum of clipped updates"
        )
        found.append((("aggregation.rule", "privacy.clip-norm"), text))
    for name in sorted(methods & set(NOT_ROBUST)):
        text = f"method.name: {name} does not work with aggregation.rule = {rule!r}: its server also works with what single clients sent"
        found.append((("method.name", "clients.methods", "aggregation.rule"), text))
    if average_embeddings:
        text = f"balancing.average-embeddings: true, but aggregation.rule = {rule!r} is not applied to the vectors"
        found.append((("balancing.average-embeddings", "aggregation.rule"), text))
    needed = 2 * aggregation.attackers + 3
    for key, number in cohorts.items() if rule == "krum" else ():
        if number < needed:
            text = (
                f"aggregation.attackers: got {aggregation.attackers}, for which krum needs {needed} clients in a round, and "
                f"{key} gives {number}. Lower aggregation.attackers, or raise {key} or num-clients."
            )
            found.append((("aggregation.attackers", "aggregation.rule", key, "num-clients"), text))
    return found


def attack_problems(attack: AttackConfig, *, num_clients: int) -> list[tuple[tuple[str, ...], str]]:
    """Name what is wrong with the attack in a federation of so many clients."""
    keys = ("attack.kind", "attack.num-clients")
    if (attack.kind == "none") != (attack.num_clients == 0):
        return [
            (keys, f"attack.num-clients: got {attack.num_clients}, with attack.kind = {attack.kind!r}. Set both, or neither.")
        ]
    if attack.num_clients > num_clients:
        text = f"attack.num-clients: expected at most num-clients ({num_clients}), got {attack.num_clients}"
        return [((*keys, "num-clients"), text)]
    return []
