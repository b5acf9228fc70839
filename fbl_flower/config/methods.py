"""Settings of the local methods, with their papers' symbols, and of federations whose clients differ (docs/methods.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from fbl_flower.config.options import option, shortened

METHODS = ("fedavg", "fedprox", "moon", "scaffold", "fedgen", "logit-adjustment", "fedlc", "feddyn")
CAPABILITIES = ("full", "rich", "none")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """How clients train: the objective, independent of what they train on."""

    name: str = option("fedavg", "local method of every client that has no other", choices=METHODS)


@dataclass(frozen=True, kw_only=True)
class FedProxConfig:
    """FedProx (Li et al., arXiv 1812.06127)."""

    mu: float = option(0.01, "weight of the squared distance to the global model; 0: FedAvg", low=0.0, high=1e6)


@dataclass(frozen=True, kw_only=True)
class MoonConfig:
    """MOON (Li et al., arXiv 2103.16257)."""

    mu: float = option(1.0, "weight of the model-contrastive loss; 0: FedAvg", low=0.0, high=1e6)
    temperature: float = option(0.5, "tau, temperature of the contrast", above=0.0, high=1e6)


@dataclass(frozen=True, kw_only=True)
class ScaffoldConfig:
    """SCAFFOLD (Karimireddy et al., arXiv 1910.06378), Option II: plain SGD, so no train.momentum and no train.clip-norm."""

    learning_rate: float = option(0.0, "eta_l, step size of its clients' plain SGD; 0: train.learning-rate", low=0.0, high=1e6)
    server_learning_rate: float = option(1.0, "eta_g, step size of the server", above=0.0, high=1e6)


@dataclass(frozen=True, kw_only=True)
class FedGenConfig:
    """FedGen (Zhu et al., arXiv 2105.10056). Its clients send their label counts."""

    latent_weight: float = option(1.0, "weight of the loss on generated features; 0: FedAvg", low=0.0, high=1e6)
    diversity: float = option(1.0, "weight of the generator's diversity loss", low=0.0, high=1e6)
    learning_rate: float = option(3e-4, "step size of the generator (Adam)", above=0.0, high=1e6)
    steps: int = option(50, "steps of the generator in a round", low=1, high=1_000_000)
    batch_size: int = option(32, "features per step of the generator", low=2, high=4096)
    hidden_width: int = option(256, "hidden units of the generator", low=1, high=8192)
    noise_width: int = option(32, "numbers of noise for each feature vector", low=1, high=8192)


@dataclass(frozen=True, kw_only=True)
class LogitAdjustmentConfig:
    """Logit adjustment (Menon et al., arXiv 2007.07314), by each client's own label counts."""

    tau: float = option(1.0, "weight of the log counts; 1: balanced softmax; 0: FedAvg", low=0.0, high=1e6)


@dataclass(frozen=True, kw_only=True)
class FedLCConfig:
    """FedLC (Zhang et al., arXiv 2209.00189)."""

    tau: float = option(1.0, "weight of the calibration of logits; 0: FedAvg", low=0.0, high=1e6)


@dataclass(frozen=True, kw_only=True)
class FedDynConfig:
    """FedDyn (Acar et al., arXiv 2111.04263)."""

    alpha: float = option(
        0.01,
        "weight of the dynamic regulariser; 0: FedAvg; 0.01 is that of the authors' example for CIFAR-10",
        low=0.0,
        high=1e6,
    )


@dataclass(frozen=True, kw_only=True)
class ClientsConfig:
    """Clients that differ. In a deployment a node states its own `capability` and `method`; these shares are for the others."""

    rich_share: float = option(
        0.0, "share of compute-rich clients: they discard nothing and fill every class up to their largest", low=0.0, high=1.0
    )
    no_generator_share: float = option(
        0.0, "share of clients that cannot generate: they train on their own data as it is", low=0.0, high=1.0
    )
    no_generator_learning_rate: float = option(
        0.0,
        "step size of clients that cannot generate, also where a node states it; 0: train.learning-rate",
        low=0.0,
        high=1e6,
    )
    methods: str = option("", "shares of clients with another method than method.name, such as 'fedprox=0.3, moon=0.2'")


def method_shares(text: str) -> list[tuple[str, float]]:
    """Read `clients.methods`: (method, share) in the order given; none if the text is blank.

    Raises:
        ValueError: Names the key, all that is wrong, and what is allowed.
    """
    problems: list[str] = []
    shares: list[tuple[str, float]] = []
    for item in text.split(",") if text.strip() else ():
        name, separator, number = (part.strip() for part in item.partition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not separator or name not in METHODS or not 0 <= share <= 1:
            problems.append(f"got {shortened(item.strip(), 40)}")
        elif name in dict(shares):
            problems.append(f"got {name!r} twice")
        else:
            shares.append((name, share))
    if problems:
        raise ValueError(
            f"clients.methods: {', '.join(problems[:3])}{', ...' if len(problems) > 3 else ''}; allowed: method=share between commas, methods {' | '.join(METHODS)}, each once, "
            "shares 0 .. 1"
        )
    if (total := sum(share for _, share in shares)) > 1 + 1e-9:
        raise ValueError(f"clients.methods: the shares sum to {total:g}; allowed: at most 1, and the rest is method.name")
    return shares


def counts_of(shares: Sequence[float], number: int) -> list[int]:
    """Spread `number` clients over shares that sum to 1 at most: the first k shares together get theirs, rounded, halves up.

    So shares that sum to 1 leave nobody out, and a kind has at most one client more or less than its share.
    """
    ends = [0, *(math.floor(round(total * number, 9) + 0.5) for total in accumulate(shares))]
    return [min(end, number) - begin for begin, end in pairwise(ends)]


def client_problems(clients: ClientsConfig, *, num_clients: int, balancing: bool) -> list[tuple[tuple[str, ...], str]]:
    """Name what is wrong with the shares, each problem with the keys that it is about."""
    found: list[tuple[tuple[str, ...], str]] = []
    capabilities = {"clients.rich-share": clients.rich_share, "clients.no-generator-share": clients.no_generator_share}
    shares: dict[str, float] = {}
    try:
        shares = dict(method_shares(clients.methods))
    except ValueError as problem:
        found.append((("clients.methods",), str(problem)))
    if (total := sum(capabilities.values())) > 1 + 1e-9:
        text = f"clients.rich-share and clients.no-generator-share: they sum to {total:g}; allowed: at most 1"
        found.append((tuple(capabilities), text))
        capabilities = {}
    for key, share in capabilities.items():
        if share > 0 and not balancing:
            text = f"{key}: got {share:g}, but balancing.enabled is false: nobody fills anything"
            found.append(((key, "balancing.enabled"), text))
    for key, kinds in (("", capabilities), ("clients.methods: ", shares)):
        for (name, share), count in zip(kinds.items(), counts_of(list(kinds.values()), num_clients), strict=True):
            if share > 0 and not count:
                text = f"{key}{name}: got {share:g}, and of {num_clients} clients that is nobody, as shares are rounded in their order"
                found.append(((name if not key else "clients.methods", "num-clients"), text))
    return found
