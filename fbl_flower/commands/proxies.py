"""Proxies for Flower's programs: connections within this machine never use one, and one that Flower cannot use is left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
_EXCEPTIONS = ("no_proxy", "no_grpc_proxy")  # gRPC reads the second one first
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def with_direct_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for Flower's programs.

    With a proxy in it, `no_proxy` gets this machine's own addresses. The user's exceptions stay. Both spellings are set,
    because programs differ in which one they read first.
    """
    usable = {name: value for name, value in environment.items() if name not in unusable_proxies(environment)}
    return usable | loopback_exceptions(usable)


def loopback_exceptions(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which this machine's own addresses are asked directly; none where no proxy is set."""
    if not _given(environment, _PROXIES):
        return {}
    found: dict[str, str] = {}
    for name in _EXCEPTIONS:
        given = _given(environment, (name,))
        if given or name == "no_proxy":
            entries = [entry.strip() for text in given.values() for entry in text.split(",")]
            # `*` excepts everything, and only where it stands alone.
            value = "*" if "*" in entries else ",".join(dict.fromkeys([*filter(None, entries), *_LOOPBACK]))
            found |= {name: value, name.upper(): value}
    return found


def unusable_proxies(environment: Mapping[str, str]) -> list[str]:
    """Return the variables with a proxy at which Flower's HTTP client (httpx) would fail, also for addresses that need none."""
    usable = {"", "http", "https"} | ({"socks5", "socks5h"} if importlib.util.find_spec("socksio") else set())
    return [
        name
        for name, value in _given(environment, _PROXIES[:3]).items()  # httpx does not read grpc_proxy
        if value.rpartition("://")[0].lower() not in usable
    ]


def _given(environment: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """Return those of the variables that are set, in both spellings."""
    spellings = [spelling for name in names for spelling in (name, name.upper())]
    return {name: environment[name] for name in spellings if environment.get(name)}
