"""FedDyn by hand: a client's steps, the server's correction, reductions, and where it settles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import quick, run_and_kill
from safetensors.numpy import load_file
from test_method_runs import checkpoint, federate, memory, results
from test_methods import CROWDS, fit, linear, probability_of_class_0, variates, white, with_batch_norm

from fbl_flower.federation import client
from fbl_flower.federation.local import run_local
from fbl_flower.federation.wire import Reply, Request
from fbl_flower.methods.base import State
from fbl_flower.methods.feddyn import FedDyn, server_correction
from fbl_flower.methods.scaffold import first_variate
from fbl_flower.methods.server import FEDDYN_H
from fbl_flower.params import to_arrays, to_state, weighted_mean


def test_two_steps_of_a_client_by_hand() -> None:
    """One class: f has no gradient. Weight and bias 1, h_k 0.2, alpha 0.5, lr 0.1. The gradient is -0.2, then -0.2 + 0.5 * 0.02:
    w = 1.02, then 1.039; h_k becomes 0.2 - 0.5 * 0.039 = 0.1805. The reported loss is f, 0."""
    model = linear(1, 1, value=1.0)
    method = FedDyn(alpha=0.5, state=to_state(variates(0.2)))
    assert fit(model, white([0]), method, epochs=2) == 0
    finished = method.finish(model)
    assert finished.sent == {} and finished.state is not None
    for name, p in model.named_parameters():
        assert p.item() == pytest.approx(1.039, abs=1e-6)
        assert finished.state[name].item() == pytest.approx(0.1805, abs=1e-6)


def test_the_server_by_hand() -> None:
    """w_t = 1; clients at 1.2 and 1.6 of N = 4, alpha 0.5, h = -0.1: h becomes -0.1 - 0.5 / 4 * 0.8 = -0.2, the model 1.4 + 0.2 / 0.5 = 1.8."""
    models = [variates(1.2), variates(1.6)]
    mean = weighted_mean(models, [1.0, 1.0]) | {"running": np.array([5.0], np.float32)}
    model, h = server_correction(mean, variates(1.0), models, variates(-0.1), alpha=0.5, num_clients=4)
    for name in ("head.weight", "head.bias"):
        assert h[name].item() == pytest.approx(-0.2, abs=1e-6) and h[name].dtype == np.float32
        assert model[name].item() == pytest.approx(1.8, abs=1e-6) and model[name].dtype == np.float32
    assert model["running"] == 5  # a buffer stays the mean's
    same, none = server_correction(mean, variates(1.0), models, variates(0.0), alpha=0.0, num_clients=4)
    assert same == mean and none["head.bias"] == 0


def test_state_is_of_parameters_and_a_client_without_images_keeps_it() -> None:
    model = with_batch_norm()
    state = {name: p.detach() + 1 for name, p in model.named_parameters()}
    method = FedDyn(alpha=0.5, state=state)
    method.begin(model, white([], num_pixels=2))
    kept = method.finish(model).state
    assert kept is not None and kept.keys() == {"features.1.weight", "features.1.bias", "head.weight", "head.bias"}
    assert all((kept[name] == state[name]).all() for name in state)


def test_it_settles_where_federated_averaging_does_not() -> None:
    """Two clients, 90 % and 50 % class 0, ten images each: the joint optimum is 70 %. Averaged logits of 9 and 1 give sqrt 9 = 3 to 1, 75 %."""
    ends = []
    for alpha in (0.0, 0.1):
        x, h = to_arrays(linear(1, 2).state_dict()), first_variate(linear(1, 2).named_parameters())
        states: list[State | None] = [None, None]
        for _ in range(60):
            models = []
            for i, crowd in enumerate(CROWDS):
                model = linear(1, 2)
                model.load_state_dict(to_state(x))
                method = FedDyn(alpha=alpha, state=states[i])
                fit(model, crowd, method, batch_size=10, epochs=100, learning_rate=0.5)
                states[i] = method.finish(model).state
                models.append(to_arrays(model.state_dict()))
            x, h = server_correction(weighted_mean(models, [1, 1]), x, models, h, alpha=alpha, num_clients=2)
        model.load_state_dict(to_state(x))
        ends.append(probability_of_class_0(model))
    assert ends == [pytest.approx(0.75, abs=1e-3), pytest.approx(0.7, abs=1e-3)]
    bias = states[0]
    assert bias is not None and math.isclose(
        bias["head.bias"][0].item(), 0.7 - 0.9, abs_tol=2e-3
    )  # h_k is the client's gradient


def small(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    return quick(tmp_path, data__num_private=120, **overrides)


@pytest.mark.parametrize("balancing", [True, False], ids=["balanced", "own-data"])
def test_alpha_zero_is_federated_averaging(tmp_path: Path, balancing: bool) -> None:
    fedavg = run_local(small(tmp_path, balancing__enabled=balancing))
    settings = small(tmp_path, balancing__enabled=balancing, method__name="feddyn")
    assert results(run_local(settings | {"feddyn.alpha": 0.0}).run_dir) == results(fedavg.run_dir)
    some = run_local(settings)
    assert results(some.run_dir) != results(fedavg.run_dir) and some.summary["left_out"] == {}


def test_only_models_travel_and_h_is_the_mean_of_the_clients(tmp_path: Path) -> None:
    """All clients take part: the server's h is the mean of theirs, as both start at zero and move alike."""
    settings = small(tmp_path, method__name="feddyn", fraction_train=1.0, feddyn__alpha=0.1, balancing__enabled=False)
    run_dir, messages = federate(settings)
    assert all(not Request.from_record(m.content).extras for m in messages if "request" in m.content)
    assert all(not Reply.from_record(m.content).extras for m in messages if "metrics" in m.content)
    clients = [memory(settings, run_dir, k, "feddyn") for k in range(4)]
    for name, h in checkpoint(run_dir, FEDDYN_H).items():
        np.testing.assert_allclose(h, np.mean([h_k[name] for h_k in clients], axis=0), atol=1e-6)
        assert np.abs(h).max() > 1e-5


def test_a_mixed_federation_corrects_by_its_own_clients(tmp_path: Path) -> None:
    settings = small(tmp_path, clients__methods="feddyn=0.5, scaffold=0.25", fraction_train=1.0)
    run = run_local(settings | {"server.optimizer": "momentum"})
    assert run.summary["status"] == "completed" and run.summary["left_out"] == {}
    assert checkpoint(run.run_dir, FEDDYN_H) and checkpoint(run.run_dir, "scaffold")


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in round 4, after a checkpoint in round 2: clients are ahead."""
    settings = small(tmp_path, method__name="feddyn", num_server_rounds=5, checkpoint_every=2)
    unbroken = run_local(settings)
    killed = run_and_kill(settings, monkeypatch, in_round=4)
    client._prepared.cache_clear()
    run_local(settings | {"resume": str(killed)})
    assert results(killed) == results(unbroken.run_dir)
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (killed, unbroken.run_dir))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
