"""Settings are tuned on the validation part: what is scored changes, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import quick
from safetensors.numpy import load_file

from fbl_flower.config import RunConfig, parse_config
from fbl_flower.data.datasets import load_parts, scored_part
from fbl_flower.errors import ConfigError
from fbl_flower.federation.local import run_local
from fbl_flower.federation.preflight import preflight
from fbl_flower.training import central
from fbl_flower.training.central import run_central
from fbl_flower.training.evaluation import evaluate
from fbl_flower.training.round import load_classifier


def accuracy_of(model: Path, config: RunConfig) -> float:
    parts = load_parts(config.data)
    classifier = load_classifier(load_file(model), config, channels=1, num_classes=10, device=torch.device("cpu"))
    return evaluate(classifier, parts.validation).accuracy


def test_a_federation_is_scored_on_validation_and_trained_as_before(tmp_path: Path) -> None:
    settings = quick(tmp_path, num_server_rounds=2, train__epochs=3)
    test = run_local(settings)
    validation = run_local(settings | {"data.evaluate-on": "validation"})
    a, b = (load_file(outcome.run_dir / "model.safetensors") for outcome in (test, validation))
    assert all((a[name] == b[name]).all() for name in a)
    rows = [json.loads(line) for line in (validation.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["accuracy"] == accuracy_of(test.run_dir / "model.safetensors", parse_config(settings))
    assert rows[-1]["accuracy"] != test.summary["final_accuracy"]  # 100 images against 397


def test_so_is_training_without_a_federation(tmp_path: Path) -> None:
    settings = quick(tmp_path, num_server_rounds=1)
    config = parse_config(settings | {"data.evaluate-on": "validation"})
    accuracy = run_central(config, "public")
    assert accuracy == pytest.approx(round(100 * accuracy) / 100)  # a share of the 100 validation images
    assert len(scored_part(config.data, load_parts(config.data))) == 100
    assert len(scored_part(parse_config(settings).data, load_parts(config.data))) == 397


@pytest.mark.parametrize(
    ("clients", "fraction", "epochs"), [(20, 0.5, 5), (7, 0.5, 6), (33, 0.1, 1), (10, 0.25, 3), (2, 0.1, 5), (1, 0.1, 10)]
)
def test_without_a_federation_there_are_as_many_image_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clients: int, fraction: float, epochs: int
) -> None:
    """10 rounds of 300 images on all clients together, on ceil(fraction x clients) of them, in epochs over 300 public images.

    That is 10 x ceil(f K) / K: 10 x 10/20, 10 x 4/7 = 5.7, 10 x 4/33 = 1.2, 10 x 3/10, 10 x 1/2, 10 x 1/1.
    """
    seen: list[int] = []
    train = central.train_centrally
    monkeypatch.setattr(central, "train_centrally", lambda *a, epochs, **k: (seen.append(epochs), train(*a, epochs=1, **k))[1])
    settings = quick(tmp_path, num_server_rounds=10, num_clients=clients, fraction_train=fraction)
    run_central(parse_config(settings), "public")
    assert seen == [epochs]


def test_without_public_images_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    config = parse_config(quick(tmp_path, data__num_public=0, data__num_validation=0))
    with pytest.raises(ConfigError, match=r"data\.num-public: no public image is left to train on"):
        run_central(config, "public")


def test_without_validation_images_nothing_starts(tmp_path: Path) -> None:
    config = parse_config(quick(tmp_path, data__evaluate_on="validation", data__num_validation=0))
    with pytest.raises(ConfigError, match=r"data\.evaluate-on: validation, but data\.num-validation leaves no image for it"):
        preflight(config)


@pytest.mark.parametrize("key", ["generator.blur", "generator.noise"])
def test_only_public_images_are_degraded(key: str) -> None:
    assert parse_config({key: 0.5, "generator.name": "public-images"}).generator.name == "public-images"
    with pytest.raises(ConfigError, match=f"{key}: got 0.5; only public-images are degraded, and generator.name is 'auto'"):
        parse_config({key: 0.5})
