"""The model that a federation starts from, where the server trains it first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import quick

from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.errors import ConfigError
from fbl_flower.federation.local import run_local
from fbl_flower.federation.preflight import preflight
from fbl_flower.params import Arrays, to_arrays
from fbl_flower.training.central import run_central, train_centrally, warm_start_model


def start_of(tmp_path: Path, **overrides: Any) -> Arrays:
    settings = quick(tmp_path, warm_start__enabled=True, warm_start__epochs=2, **overrides)
    return to_arrays(warm_start_model(parse_config(settings)).state_dict())


def same(a: Arrays, b: Arrays) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_public_images_are_what_it_is_trained_on(tmp_path: Path) -> None:
    config = parse_config(quick(tmp_path))
    parts = load_parts(config.data)
    by_hand = train_centrally(config, parts, parts.public, epochs=2, seed=config.seed)
    assert same(start_of(tmp_path, warm_start__images="public"), to_arrays(by_hand.state_dict()))


def test_its_step_size_is_its_own_and_the_clients_keep_theirs(tmp_path: Path) -> None:
    slow_clients = {"warm_start__images": "public", "train__learning_rate": 0.001}
    start = start_of(tmp_path, **slow_clients, warm_start__learning_rate=0.1)
    assert same(start, start_of(tmp_path, warm_start__images="public"))  # 0.1 is the default of train.learning-rate
    assert not same(start, start_of(tmp_path, **slow_clients))


def test_the_federation_starts_from_it(tmp_path: Path) -> None:
    """Round 0 is as good as the same training without a federation: 1 round x 4 of 4 clients x 300 images in 1 epoch of 300."""
    whole = {"num_server_rounds": 1, "fraction_train": 1.0, "train__epochs": 4}
    settings = quick(tmp_path, **whole, warm_start__enabled=True, warm_start__images="public", warm_start__epochs=4)
    rows = [json.loads(line) for line in (run_local(settings).run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["accuracy"] == run_central(parse_config(settings), "public") > 0.2


def test_public_images_need_no_generator(tmp_path: Path) -> None:
    missing = {"generator__name": "diffusion", "generator__path": str(tmp_path / "nowhere"), "balancing__enabled": False}
    settings = quick(tmp_path, warm_start__enabled=True, warm_start__images="public", **missing)
    preflight(parse_config(settings))


def test_without_public_images_nothing_starts(tmp_path: Path) -> None:
    none_left = {"data__num_public": 0, "data__num_validation": 0, "balancing__enabled": False}
    config = parse_config(quick(tmp_path, warm_start__enabled=True, warm_start__images="public", **none_left))
    with pytest.raises(ConfigError, match=r"data\.num-public: no public image is left to train on"):
        preflight(config)


def test_all_public_images_are_taken(tmp_path: Path) -> None:
    settings = quick(tmp_path, warm_start__enabled=True, warm_start__images="public", warm_start__num_images=100)
    with pytest.raises(
        ConfigError, match=r"warm-start\.num-images: got 100; warm-start\.images = 'public' takes all of them: 0"
    ):
        parse_config(settings)
