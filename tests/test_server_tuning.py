"""The server's training of the global model on synthetic images: by hand, what it leaves alone, when it happens, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import quick, run_and_kill, watch_log
from safetensors.numpy import load_file
from test_method_runs import federate, results

from fbl_flower.config import RunConfig, parse_config
from fbl_flower.config.server import ServerTuningConfig
from fbl_flower.data.datasets import load_parts
from fbl_flower.errors import ConfigError, GeneratorError, RunFailed
from fbl_flower.federation import client
from fbl_flower.federation.local import run_local
from fbl_flower.federation.preflight import preflight
from fbl_flower.federation.wire import Request
from fbl_flower.models import new_classifier
from fbl_flower.params import Arrays, to_arrays
from fbl_flower.training.central import synthetic_examples
from fbl_flower.training.evaluation import predict
from fbl_flower.training.round import load_classifier
from fbl_flower.training.server_tuning import tune


def small(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    return quick(
        tmp_path, **{"data__num_private": 120, "server_tuning__num_images": 40, "server_tuning__epochs": 1} | overrides
    )


def model_of(config: RunConfig) -> Arrays:
    return to_arrays(new_classifier(config.model, channels=1, num_classes=10, seed=3).state_dict())


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_head_takes_steps_on_features_of_synthetic_images(tmp_path: Path) -> None:
    """Two steps on all images at once, without momentum, by the gradient of the mean cross-entropy: (p - y)^T z / n and the mean of p - y."""
    config = parse_config(
        small(
            tmp_path,
            server_tuning__part="head",
            server_tuning__epochs=2,
            server_tuning__learning_rate=0.3,
            train__batch_size=40,
            train__momentum=0.0,
            train__weight_decay=0.0,
            train__clip_norm=0.0,
            train__augment=False,
            train__precision="fp32",
        )
    )
    parts, arrays = load_parts(config.data), model_of(config)
    model = load_classifier(arrays, config, channels=1, num_classes=10, device=torch.device("cpu"))
    images = synthetic_examples(config, parts, num_images=40, purpose="server-tuning")
    assert images.counts(10).tolist() == [4] * 10 and images.synthetic.all()
    z = predict(model, images.images)[0].numpy()
    weight, bias, y = arrays["head.weight"].copy(), arrays["head.bias"].copy(), np.eye(10, dtype=np.float32)[images.labels]
    for _ in range(2):
        e = np.exp(z @ weight.T + bias)
        error = (e / e.sum(1, keepdims=True) - y) / 40
        weight, bias = weight - 0.3 * error.T @ z, bias - 0.3 * error.sum(0)
    tuned = tune(arrays, config, parts, server_round=1)
    np.testing.assert_allclose(tuned["head.weight"], weight, atol=1e-5)
    np.testing.assert_allclose(tuned["head.bias"], bias, atol=1e-5)


@pytest.mark.parametrize("part", ["head", "model"])
def test_a_frozen_network_keeps_parameters_and_batch_statistics(tmp_path: Path, part: str) -> None:
    config = parse_config(
        small(
            tmp_path,
            server_tuning__part=part,
            model__name="resnet18",
            model__norm="batch",
            model__stem="32x32",
            model__width=8,
            train__weight_decay=0.1,
        )
    )
    before, parts = model_of(config), load_parts(config.data)
    after = tune(before, config, parts, server_round=1)
    assert {name: a.shape for name, a in before.items()} == {name: a.shape for name, a in after.items()}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == ({"head.weight", "head.bias"} if part == "head" else set(before))
    same, other = (tune(before, config, parts, server_round=r) for r in (1, 2))
    assert all(np.array_equal(after[name], same[name]) for name in after)
    assert not np.array_equal(after["head.weight"], other["head.weight"])  # another order in another round


@pytest.mark.parametrize(
    ("part", "every", "last", "rounds"),
    [("none", 1, 6, []), ("head", 0, 6, [6]), ("head", 1, 3, [1, 2, 3]), ("model", 4, 9, [4, 8])],
)
def test_when_it_is_due(part: str, every: int, last: int, rounds: list[int]) -> None:
    tuning = ServerTuningConfig(part=part, every=every)
    assert [r for r in range(last + 1) if tuning.due(r, last=last)] == rounds


def test_after_the_last_round_the_result_is_the_tuned_model(tmp_path: Path) -> None:
    """Until then the run is as without; its checkpoint stays untuned, so a prolonged run is an unbroken one."""
    plain = run_local(small(tmp_path)).run_dir
    settings = small(tmp_path, server_tuning__part="head", checkpoint_every=1)
    config = parse_config(settings)
    run = run_local(settings)
    before, after = rows_of(plain), rows_of(run.run_dir)
    assert before[:3] == after[:3] and not any("untuned_accuracy" in row for row in after[:3])
    assert (after[3]["untuned_accuracy"], after[3]["untuned_loss"]) == (before[3]["accuracy"], before[3]["loss"])
    assert after[3]["loss"] != before[3]["loss"]
    for name in ("accuracy", "loss", "untuned_accuracy", "untuned_loss"):
        assert run.summary[f"final_{name}"] == after[3][name]
    untuned = load_file(plain / "model.safetensors")
    assert all(np.array_equal(load_file(run.run_dir / "checkpoint.safetensors")[name], a) for name, a in untuned.items())
    expected = tune(untuned, config, load_parts(config.data), server_round=3)
    written = load_file(run.run_dir / "model.safetensors")
    assert all(np.array_equal(written[name], a) for name, a in expected.items())
    (run.run_dir / "model.safetensors").unlink()
    run_local(settings | {"resume": str(run.run_dir)})  # nothing is left but to write the model
    assert all(np.array_equal(load_file(run.run_dir / "model.safetensors")[name], a) for name, a in expected.items())
    run_local(settings | {"resume": str(run.run_dir), "num-server-rounds": 4})
    longer = run_local(settings | {"num-server-rounds": 4})
    assert results(run.run_dir)[1] == results(longer.run_dir)[1]
    assert rows_of(run.run_dir)[4] == rows_of(longer.run_dir)[4]


def test_the_next_round_starts_from_the_tuned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    watch_log(monkeypatch, lines)
    settings = small(tmp_path, server_tuning__part="model", server_tuning__every=2, num_server_rounds=3, method__name="moon")
    run_dir, messages = federate(settings)
    assert lines.count("Server: tunes its model on 40 images of its generator every 2 rounds") == 1
    plain_dir, plain_messages = federate(settings | {"server-tuning.part": "none"})

    def sent_in(messages: list[Any], server_round: int) -> Arrays:
        requests = [Request.from_record(m.content) for m in messages if "request" in m.content]
        return next(r.arrays for r in requests if r.server_round == server_round)

    config = parse_config(settings)
    tuned = tune(sent_in(plain_messages, 3), config, load_parts(config.data), server_round=2)
    for name, array in sent_in(messages, 3).items():
        np.testing.assert_array_equal(array, tuned[name])
    rows, plain = rows_of(run_dir), rows_of(plain_dir)
    assert rows[:2] == plain[:2] and "untuned_loss" not in rows[3]
    assert rows[2]["untuned_loss"] == plain[2]["loss"] != rows[2]["loss"] and rows[3]["loss"] != plain[3]["loss"]


@pytest.mark.parametrize("every", [0, 2])
def test_a_killed_run_resumes_to_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    settings = small(
        tmp_path, server_tuning__part="model", server_tuning__every=every, num_server_rounds=4, checkpoint_every=2, server__average=0.5,
        server__optimizer="momentum", server__momentum=0.5,
    )  # fmt: skip
    unbroken = run_local(settings)
    killed = run_and_kill(settings, monkeypatch, in_round=4)
    client._prepared.cache_clear()
    run_local(settings | {"resume": str(killed)})
    assert results(killed) == results(unbroken.run_dir)
    for name in ("checkpoint.safetensors", "averaged.safetensors"):
        a, b = (load_file(folder / name) for folder in (killed, unbroken.run_dir))
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_without_balancing_the_server_alone_needs_the_generator(tmp_path: Path) -> None:
    """It is an error even where the clients have their own machines, and none where nothing is tuned."""
    missing = {"generator__name": "diffusion", "generator__path": str(tmp_path / "nowhere"), "balancing__enabled": False}
    preflight(parse_config(small(tmp_path, **missing)), clients_here=False)
    with pytest.raises(GeneratorError, match="nowhere"):
        preflight(parse_config(small(tmp_path, server_tuning__part="head", **missing)), clients_here=False)


def test_repeats_of_own_images_are_no_generator_for_the_server() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"generator.name": "own-images", "server-tuning.part": "head"})
    assert caught.value.problems == [
        "generator.name: 'own-images' repeats a client's own images; the server has none to tune on. Choose another generator, or "
        "server-tuning.part = 'none'."
    ]


def test_a_tuning_that_diverges_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="server-tuning: the loss or the model is not finite; lower the learning rate"):
        run_local(small(tmp_path, server_tuning__part="model", server_tuning__learning_rate=1e6, server_tuning__epochs=9))
