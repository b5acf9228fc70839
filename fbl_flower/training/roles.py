"""What each client of a mixed federation can do, and by which method it trains (Sec. "Extended, unified framework")."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from fbl_flower.config import RunConfig
from fbl_flower.config.methods import CAPABILITIES, METHODS, counts_of, method_shares
from fbl_flower.errors import ConfigError
from fbl_flower.seeding import numpy_stream


@dataclass(frozen=True, kw_only=True)
class Role:
    """One client's part.

    Attributes:
        capability: full: balances at the balance point; rich: discards nothing and fills every class up to its largest; none: cannot
            generate, and trains on its own data as it is.
        method: Its local method.
    """

    capability: str
    method: str


def role_of(config: RunConfig, client: int, *, capability: str = "", method: str = "") -> Role:
    """Return a client's role: what its node states, and what the seed draws where it states nothing.

    Args:
        config: The run's configuration.
        client: 0 .. num-clients - 1.
        capability: As the node states it; empty: it does not.
        method: The same.

    Raises:
        ConfigError: The node states something unknown.
    """
    if problems := stated_problems(capability, method):
        raise ConfigError(problems)
    drawn = drawn_roles(config)[client]
    return Role(capability=capability or drawn.capability, method=method or drawn.method)


def settings_of(config: RunConfig, role: Role) -> RunConfig:
    """Return the settings by which a client trains: one that cannot generate may have a step size of its own, since skewed data wants smaller ones."""
    rate = config.clients.no_generator_learning_rate
    if role.capability != "none" or not rate:
        return config
    return replace(config, train=replace(config.train, learning_rate=rate))


def stated_problems(capability: str, method: str) -> list[str]:
    """Say what is wrong with what a node states; empty texts are fine."""
    problems = []
    if capability and capability not in CAPABILITIES:
        problems.append(f"capability: got {capability!r}; allowed in a node's --node-config: {' | '.join(CAPABILITIES)}")
    if method and method not in METHODS:
        problems.append(f"method: got {method!r}; allowed in a node's --node-config: {' | '.join(METHODS)}")
    return problems


@functools.lru_cache(maxsize=8)
def drawn_roles(config: RunConfig) -> tuple[Role, ...]:
    """Draw the role of every client from the run's seed, in the exact numbers of `counts_of`.

    A higher share contains the clients of a lower one.
    Rich clients come from the front of a permutation, those that cannot generate from its end, and methods from another permutation.
    """
    number, clients = config.num_clients, config.clients
    order = numpy_stream(config.seed, "capability").permutation(number).tolist()
    num_rich, num_none = counts_of([clients.rich_share, clients.no_generator_share], number)
    capability = dict.fromkeys(order[:num_rich], "rich") | dict.fromkeys(order[number - num_none :], "none")
    waiting = numpy_stream(config.seed, "method").permutation(number).tolist()
    method: dict[int, str] = {}
    shares = dict(method_shares(clients.methods))
    for name, chosen in zip(shares, counts_of(list(shares.values()), number), strict=True):
        method |= dict.fromkeys(waiting[:chosen], name)
        waiting = waiting[chosen:]
    return tuple(Role(capability=capability.get(k, "full"), method=method.get(k, config.method.name)) for k in range(number))
