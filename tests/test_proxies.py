"""Proxies: connections within this machine never use one."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbl_flower.commands import proxies
from fbl_flower.commands.deploy.plain import PlainCommand
from fbl_flower.commands.flower_cli import flower_environment
from fbl_flower.commands.proxies import loopback_exceptions, unusable_proxies, with_direct_loopback

LOOPBACK = "127.0.0.1,localhost,::1"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


@pytest.mark.parametrize("name", [*PROXIES, *map(str.upper, PROXIES)])
def test_any_proxy_excepts_this_machine(name: str) -> None:
    given = {name: "http://proxy.example.org:3128", "HOME": "/h"}
    assert with_direct_loopback(given) == given | {"no_proxy": LOOPBACK, "NO_PROXY": LOOPBACK}


@pytest.mark.parametrize("given", [{}, {"no_proxy": "a"}, {"http_proxy": ""}, {"HTTP_PROXY": "", "NO_PROXY": ""}])
def test_without_a_proxy_nothing_is_set(given: dict[str, str]) -> None:
    """A `no_proxy` of ours would hide the proxies that macOS knows."""
    assert with_direct_loopback(given) == given


def test_the_users_exceptions_stay() -> None:
    given = {"https_proxy": "p", "no_proxy": ".lan, 10.0.0.0/8,", "NO_PROXY": "localhost,.corp", "NO_GRPC_PROXY": "fleet"}
    assert loopback_exceptions(given) == {
        **dict.fromkeys(("no_proxy", "NO_PROXY"), ".lan,10.0.0.0/8,localhost,.corp,127.0.0.1,::1"),
        **dict.fromkeys(("no_grpc_proxy", "NO_GRPC_PROXY"), f"fleet,{LOOPBACK}"),
    }
    assert loopback_exceptions({"all_proxy": "p", "no_proxy": "*"}) == {"no_proxy": "*", "NO_PROXY": "*"}


def test_proxies_that_flower_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """`socks://` is what GNOME sets."""
    given = {
        "all_proxy": "socks://127.0.0.1:1080/",
        "HTTPS_PROXY": "socks5h://p:1",
        "http_proxy": "p:3128",
        "GRPC_PROXY": "x://y",
    }
    monkeypatch.setattr(proxies.importlib.util, "find_spec", lambda name: None)
    assert unusable_proxies(given) == ["HTTPS_PROXY", "all_proxy"]
    assert with_direct_loopback(given).keys() == {"http_proxy", "GRPC_PROXY", "no_proxy", "NO_PROXY"}
    monkeypatch.setattr(proxies.importlib.util, "find_spec", lambda name: name == "socksio")
    assert unusable_proxies(given) == ["all_proxy"]


@given(
    proxy=st.sampled_from(["http://127.0.0.1:9", "https://p:1", "p:3128", "socks5://p:1", "socks://p:1/", "ftp://p"]),
    names=st.sets(st.sampled_from([*PROXIES, *map(str.upper, PROXIES)]), min_size=1),
    exceptions=st.sampled_from(["", "a.b", "*", "::1", " , "]),
)
def test_libraries_ask_this_machine_directly(proxy: str, names: set[str], exceptions: str) -> None:
    """httpx, which Flower uses, and urllib; httpx also accepts what is left of the proxies."""
    import httpx

    environment = with_direct_loopback({**dict.fromkeys(names, proxy), "no_proxy": exceptions})
    with pytest.MonkeyPatch.context() as patch:
        for name in (*PROXIES, "no_proxy", "no_grpc_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        with httpx.Client() as client:
            for address in ("127.0.0.1:39091", "localhost", "[::1]:8000"):
                url = httpx.URL(f"http://{address}/health")
                assert client._transport_for_url(url) is client._transport
        assert not urllib.request.getproxies_environment().get("http") or urllib.request.proxy_bypass("127.0.0.1:80")


def test_programs_of_flower_get_the_exceptions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The processes of a deployment too; and the command that is shown says so."""
    for name in (*PROXIES, "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert "no_proxy" not in flower_environment() and "no_proxy" not in PlainCommand(arguments=["flwr"], home=tmp_path).text
    monkeypatch.setenv("HTTP_PROXY", "http://p:1")
    assert flower_environment(tmp_path)["no_proxy"] == LOOPBACK
    assert f"no_proxy={LOOPBACK} NO_PROXY={LOOPBACK} flwr" in PlainCommand(arguments=["flwr"], home=tmp_path).text
    code = "from fbl_flower.commands.deploy.plain import PlainCommand as P; import pathlib, sys\nP(arguments=['env'], home=pathlib.Path(sys.argv[1])).become()"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=os.environ, capture_output=True, text=True, check=True)
    assert f"no_proxy={LOOPBACK}" in done.stdout.splitlines()


def test_ray_is_quiet_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setenv("RAY_DEDUP_LOGS", "1")
    environment = flower_environment()
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0" and environment["RAY_DEDUP_LOGS"] == "1"


def test_ray_asks_for_a_token_that_differs_each_time_and_a_cluster_of_the_user_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    one, other = flower_environment(), flower_environment()
    assert one["RAY_AUTH_MODE"] == "token" and len(one["RAY_AUTH_TOKEN"]) == 64
    assert one["RAY_AUTH_TOKEN"] != other["RAY_AUTH_TOKEN"]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    assert flower_environment()["RAY_AUTH_TOKEN"] == "mine"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "RAY_AUTH_TOKEN" not in flower_environment()
