"""Clients that play attackers: who they are, what they send, and that nobody does by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import quick, watch_log, write_folder
from test_attendance import federate

from fbl_flower.config import RunConfig, parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.errors import ConfigError
from fbl_flower.federation.local import run_local
from fbl_flower.params import Arrays
from fbl_flower.reporting.rundir import RunDirectory
from fbl_flower.training.attack import attackers, sent_model
from fbl_flower.training.prepare import client_examples

RECEIVED = {"w": np.array([1.0, 2.0], np.float32), "n": np.array(4)}
TRAINED = {"w": np.array([4.0, 6.0], np.float32), "n": np.array(4)}


def attack(tmp_path: Path, kind: str, number: int = 4, **settings: Any) -> RunConfig:
    return parse_config(quick(tmp_path, attack__kind=kind, attack__num_clients=number, **settings))


def sent(config: RunConfig, client: int = 0, server_round: int = 1) -> Arrays:
    return sent_model(RECEIVED, TRAINED, config, client=client, server_round=server_round)


def test_the_seed_draws_who_attacks_and_more_include_fewer(tmp_path: Path) -> None:
    drawn = [attackers(attack(tmp_path, "scale", number, num_clients=10)) for number in (1, 3, 10)]
    assert [len(clients) for clients in drawn] == [1, 3, 10]
    assert set(drawn[0]) < set(drawn[1]) < set(drawn[2]) and drawn[1] == sorted(drawn[1])
    others = {tuple(attackers(attack(tmp_path, "scale", 1, num_clients=10, seed=seed))) for seed in range(20)}
    assert len(others) > 3


def test_models_of_attackers(tmp_path: Path) -> None:
    np.testing.assert_allclose(sent(attack(tmp_path, "scale", attack__strength=2.0))["w"], [7, 10])
    np.testing.assert_allclose(sent(attack(tmp_path, "sign-flip"))["w"], [-2, -2])
    for kind in ("scale", "sign-flip", "noise"):
        model = sent(attack(tmp_path, kind))
        assert model["w"].dtype == np.float32 and model["n"] == 4
    assert sent(attack(tmp_path, "label-flip")) is TRAINED


def test_noise_has_the_stated_norm_and_a_stream_of_its_own(tmp_path: Path) -> None:
    config, shape = attack(tmp_path, "noise", attack__strength=3.0), (300, 300)
    received, trained = {"w": np.zeros(shape, np.float32)}, {"w": np.full(shape, 0.1, np.float32)}
    norm = np.linalg.norm(trained["w"])
    noise = [
        sent_model(received, trained, config, client=client, server_round=server_round)["w"] - trained["w"]
        for client, server_round in ((0, 1), (0, 2), (1, 1), (0, 1))
    ]
    assert np.linalg.norm(noise[0]) == pytest.approx(3 * norm, rel=0.02)
    np.testing.assert_array_equal(noise[0], noise[3])
    assert not (noise[0] == noise[1]).any() and not (noise[0] == noise[2]).any()


def test_honest_clients_send_what_they_trained(tmp_path: Path) -> None:
    config = attack(tmp_path, "scale", 1)
    (hostile,) = attackers(config)
    for client in range(4):
        assert (sent(config, client) is TRAINED) == (client != hostile)
    assert all(sent(parse_config(quick(tmp_path)), client) is TRAINED for client in range(4))


def test_label_flip_is_for_the_attackers_own_images(tmp_path: Path) -> None:
    plain, flipped = parse_config(quick(tmp_path)), attack(tmp_path, "label-flip", 2)
    parts = load_parts(plain.data)
    for client in range(4):
        before, after = (client_examples(config, parts, client) for config in (plain, flipped))
        torch.testing.assert_close(after.images, before.images)
        expected = 9 - before.labels if client in attackers(flipped) else before.labels
        torch.testing.assert_close(after.labels, expected)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"attack__kind": "scale"}, "attack.num-clients: got 0, with attack.kind = 'scale'. Set both, or neither."),
        ({"attack__num_clients": 1}, "attack.num-clients: got 1, with attack.kind = 'none'"),
        ({"attack__kind": "noise", "attack__num_clients": 5}, r"attack.num-clients: expected at most num-clients \(4\), got 5"),
    ],
)
def test_attacks_that_are_none(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as found:
        parse_config(quick(tmp_path, **settings))
    assert len(found.value.problems) == 1


def test_a_run_names_its_attackers_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    settings = {"num_server_rounds": 2, "attack__kind": "noise", "attack__num_clients": 2, "aggregation__rule": "median"}
    one, two = (run_local(quick(tmp_path / name, **settings)) for name in ("one", "two"))
    names = ", ".join(map(str, attackers(attack(tmp_path, "noise", 2))))
    assert f"attack.kind: noise is simulated by the clients {names}" in lines
    assert (one.run_dir / "metrics.jsonl").read_bytes() == (two.run_dir / "metrics.jsonl").read_bytes()
    plain = run_local(quick(tmp_path / "plain", num_server_rounds=2, aggregation__rule="median"))
    assert RunDirectory(plain.run_dir).read_rows("metrics.jsonl")[2] != RunDirectory(one.run_dir).read_rows("metrics.jsonl")[2]


def test_a_node_with_images_of_its_own_refuses(tmp_path: Path) -> None:
    own = write_folder(tmp_path / "own", {str(digit): 2 for digit in range(10)})
    settings = {"num_server_rounds": 1, "attack__kind": "label-flip", "attack__num_clients": 4, "fraction_train": 1.0}
    rows, _ = federate(tmp_path, lambda _: {1, 2, 3, 4}, {2: {"data-path": str(own)}}, **settings)
    assert rows[0]["clients"] == [0, 2, 3]
    assert "attack.kind: this node has images of its own (data-path)" in rows[0]["left_out"]["1"]
