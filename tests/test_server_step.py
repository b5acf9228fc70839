"""Server optimizers and the average over rounds: steps by hand, reductions, what travels, and resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import quick, run_and_kill, watch_log
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_method_runs import checkpoint, federate, results

from fbl_flower.config.server import ServerConfig
from fbl_flower.federation import client
from fbl_flower.federation.local import run_local
from fbl_flower.federation.wire import Request
from fbl_flower.methods.server_step import MOMENTUM, VARIANCE, next_average, server_step
from fbl_flower.params import Arrays


def arrays(w: float, running: float = 0.0, batches: int = 0) -> Arrays:
    return {"w": np.array([w], np.float32), "running": np.array([running], np.float32), "batches": np.array(batches)}


def steps(config: ServerConfig, means: list[float]) -> list[float]:
    """Let the clients' mean be w + d for each d, from w = 1."""
    x, state, path = arrays(1.0), {}, []
    for d in means:
        x, state = server_step(x, arrays(float(x["w"][0]) + d, running=d), state, config=config, parameters=["w"])
        assert x["running"] == np.float32(d)  # a buffer is the mean's
        path.append(float(x["w"][0]))
    return path


def test_two_steps_with_momentum_by_hand() -> None:
    """m = 0.4, then 0.5 * 0.4 + 0.1 = 0.3; x = 1 + 0.5 * 0.4 = 1.2, then 1.2 + 0.5 * 0.3 = 1.35."""
    config = ServerConfig(optimizer="momentum", learning_rate=0.5, momentum=0.5)
    assert steps(config, [0.4, 0.1]) == pytest.approx([1.2, 1.35], abs=1e-6)


def test_two_steps_of_adam_by_hand() -> None:
    """beta1 = 0.5, beta2 = 0.75, tau = 0.1, eta = 0.1, d = 0.4 and -0.4. m = 0.2, then -0.1; v = 0.75 * 0.01 + 0.25 * 0.16 = 0.0475, then
    0.75 * 0.0475 + 0.04 = 0.075625. Steps: 0.1 * 0.2 / (sqrt 0.0475 + 0.1), then -0.1 * 0.1 / (0.275 + 0.1)."""
    config = ServerConfig(optimizer="adam", learning_rate=0.1, momentum=0.5, beta2=0.75, tau=0.1)
    first = 1 + 0.02 / (math.sqrt(0.0475) + 0.1)
    assert steps(config, [0.4, -0.4]) == pytest.approx([first, first - 0.01 / 0.375], abs=1e-6)


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5),
)
def test_without_momentum_the_whole_step_leads_to_the_mean(before: list[float], mean: list[float]) -> None:
    n = min(len(before), len(mean))
    x, y = ({"w": np.array(values[:n], np.float32)} for values in (before, mean))
    after, _ = server_step(x, y, {}, config=ServerConfig(optimizer="momentum", momentum=0.0), parameters=["w"])
    np.testing.assert_allclose(after["w"], y["w"], rtol=1e-6)
    none, state = server_step(x, y, {}, config=ServerConfig(), parameters=["w"])
    assert np.array_equal(none["w"], y["w"]) and state == {}


def test_the_average_by_hand() -> None:
    """Round 1: a = min(0.5, 2 / 11): (2 * 1 + 9 * 12) / 11 = 10. Round 30: a = 0.5 < 31 / 40: (10 + 4) / 2 = 7. Counts are the model's."""
    one = next_average(arrays(1.0, running=1.0, batches=3), arrays(12.0, running=12.0, batches=5), decay=0.5, server_round=1)
    assert (one["w"].item(), one["running"].item(), one["batches"].item()) == (pytest.approx(10), pytest.approx(10), 5)
    assert next_average(one, arrays(4.0), decay=0.5, server_round=30)["w"].item() == pytest.approx(7)
    assert one["w"].dtype == np.float32 and one["batches"].dtype.kind == "i"


def small(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    return quick(tmp_path, data__num_private=120, balancing__enabled=False, **overrides)


def test_a_rate_of_one_without_momentum_is_federated_averaging(tmp_path: Path) -> None:
    fedavg = run_local(small(tmp_path))
    plain = run_local(small(tmp_path, server__optimizer="momentum", server__momentum=0.0))
    for a, b in zip(*(load_file(run.run_dir / "model.safetensors").values() for run in (fedavg, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    assert results(run_local(small(tmp_path, server__momentum=0.1)).run_dir) == results(fedavg.run_dir)  # none: no effect
    for optimizer, rate in (("momentum", 1.0), ("adam", 0.01)):
        other = run_local(small(tmp_path, server__optimizer=optimizer, server__learning_rate=rate))
        assert results(other.run_dir) != results(fedavg.run_dir)


@pytest.mark.parametrize(("optimizer", "norm"), [("momentum", "group"), ("adam", "group"), ("adam", "batch")])
def test_a_killed_run_resumes_to_equal_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, norm: str
) -> None:
    """The tiny network has no BatchNorm; a narrow ResNet-18 has it."""
    narrow = {"model__name": "resnet18", "model__norm": "batch", "model__stem": "32x32", "model__width": 8}
    settings = quick(
        tmp_path, server__optimizer=optimizer, server__learning_rate=0.05, server__average=0.9, checkpoint_every=2,
        num_server_rounds=5, data__num_private=80, **(narrow if norm == "batch" else {}),
    )  # fmt: skip
    unbroken = run_local(settings)
    killed = run_and_kill(settings, monkeypatch, in_round=4)
    client._prepared.cache_clear()
    run_local(settings | {"resume": str(killed)})
    assert results(killed) == results(unbroken.run_dir)
    for name in ("checkpoint.safetensors", "averaged.safetensors"):
        a, b = (load_file(folder / name) for folder in (killed, unbroken.run_dir))
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
    kept = checkpoint(killed, MOMENTUM)
    assert any(np.abs(array).max() > 0 for array in kept.values()) and not any("running" in name for name in kept)
    assert bool(checkpoint(killed, VARIANCE)) == (optimizer == "adam")


def test_the_average_is_evaluated_and_goes_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    plain = run_local(small(tmp_path)).run_dir
    assert not any(line.startswith("Server:") for line in lines)
    settings = small(tmp_path, server__average=0.9)
    run_dir, messages = federate(settings)
    assert lines.count("Server: an average over rounds, decay 0.9") == 1
    assert results(run_dir)[1] == results(plain)[1]  # the model itself is not changed
    requests = [Request.from_record(m.content) for m in messages if "request" in m.content]
    assert all(not request.extras for request in requests)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert rows[0]["averaged_loss"] == rows[0]["loss"]  # the first model starts it
    assert all(0 <= row["averaged_accuracy"] <= 1 and row["averaged_loss"] != row["loss"] for row in rows[1:])
    for name in ("accuracy", "loss", "averaged_accuracy", "averaged_loss"):
        assert summary[f"final_{name}"] == rows[-1][name]
    model, average = (load_file(run_dir / f"{name}.safetensors") for name in ("model", "averaged"))
    assert model.keys() == average.keys() and any(not np.array_equal(model[name], average[name]) for name in model)
