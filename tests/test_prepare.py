"""A client's start: its plan, limited or not, and the images that go with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import quick

from fbl_flower.config import RunConfig, parse_config
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.models import new_classifier
from fbl_flower.params import to_arrays
from fbl_flower.training import prepare
from fbl_flower.training.prepare import ClientData, prepare_client
from fbl_flower.training.round import run_local_round


def config_of(tmp_path: Path, **changes: object) -> RunConfig:
    return parse_config(quick(tmp_path, **changes))


def prepared(config: RunConfig, client: int, folder: Path) -> ClientData:
    return prepare_client(config, client, cache_folder=folder)


def counts(data: ClientData) -> tuple[np.ndarray, np.ndarray]:
    return data.real.counts(data.num_classes).numpy(), data.fill.counts(data.num_classes).numpy()


def test_the_plan_and_the_images_agree(tmp_path: Path) -> None:
    for client in range(4):
        data = prepared(config_of(tmp_path), client, tmp_path)
        assert data.plan is not None and data.plan.num_balanced == len(data.real)
        assert (counts(data)[1] == data.plan.fill).all()
        assert (np.diff(data.fill.labels.numpy()) >= 0).all()


def test_a_capped_share_of_synthetic_images(tmp_path: Path) -> None:
    config = config_of(tmp_path, balancing__max_filled_share=0.25)
    for client in range(4):
        free, capped = prepared(config_of(tmp_path), client, tmp_path), prepared(config, client, tmp_path)
        assert free.plan is not None and capped.plan is not None
        assert len(capped.fill) == min(len(free.fill), len(free.real) // 4)
        assert capped.plan.num_balanced == len(capped.real)
        assert (capped.plan.keep <= counts(capped)[0]).all() and (counts(capped)[1] == capped.plan.fill).all()


class Slow:
    """A generator under whose eyes time passes: one second a batch."""

    batch_size = 10

    def __init__(self, inner: ImageGenerator, clock: list[float]) -> None:
        self.fingerprint, self._inner, self._clock = inner.fingerprint, inner, clock

    def generate(self, labels: list[int], seeds: list[int]) -> torch.Tensor:
        self._clock[0] += 1
        return self._inner.generate(labels, seeds)


def test_when_time_runs_out_all_classes_have_their_part_and_the_total_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, generator__time_budget=3.0, data__alpha=0.05)
    whole = prepared(replace(config, generator=replace(config.generator, time_budget=0.0)), 0, tmp_path / "whole")
    clock = [0.0]
    generator = Slow(prepare.shared_generator(config), clock)
    monkeypatch.setattr(prepare, "shared_generator", lambda *_: generator)
    for module in ("balancing.filling", "generation.cache"):
        monkeypatch.setattr(f"fbl_flower.{module}.time.monotonic", lambda: clock[0])
    data = prepared(config, 0, tmp_path / "cache")
    assert data.plan is not None and whole.plan is not None
    real, made = counts(data)
    assert made.sum() == 30 < whole.plan.fill.sum()
    assert (made == data.plan.fill).all() and (made <= whole.plan.fill).all()
    open_classes = made < whole.plan.fill  # generated in turn: a class is ahead of another by one image at most
    assert made[open_classes].max() - made[open_classes].min() <= 1
    assert data.plan.num_balanced == len(data.real) and (data.plan.keep <= real).all()
    assert data.unfilled == pytest.approx(1 - 30 / whole.plan.fill.sum()) and whole.unfilled == 0
    same = prepare_client(config, 0, cache_folder=tmp_path / "cache", may_generate=False)  # as in the rounds that follow
    assert (counts(same)[1] == made).all() and same.unfilled == data.unfilled and (same.plan.keep == data.plan.keep).all()
    later = prepared(config, 0, tmp_path / "cache")  # the next run goes on where this one stopped
    assert counts(later)[1].sum() == min(60, whole.plan.fill.sum())


def test_who_may_not_generate_gets_what_is_there(tmp_path: Path) -> None:
    """Such as the pictures of a run in which this client was never prepared; without a time budget, too."""
    config = config_of(tmp_path)
    data = prepare_client(config, 0, cache_folder=tmp_path / "cache", may_generate=False)
    assert len(data.fill) == 0 and data.unfilled == 1 and data.plan is not None and data.plan.num_balanced == len(data.real)
    whole = prepared(config, 0, tmp_path / "cache")
    assert len(whole.fill) > 0
    again = prepare_client(config, 0, cache_folder=tmp_path / "cache", may_generate=False)
    assert torch.equal(again.fill.images, whole.fill.images) and again.unfilled == 0


def test_a_client_whose_plan_has_changed_chooses_its_images_anew(tmp_path: Path) -> None:
    config = config_of(tmp_path, balancing__replay_period=0, data__alpha=0.05)
    data = prepared(config, 0, tmp_path)
    limited = prepared(replace(config, balancing=replace(config.balancing, max_filled_share=0.2)), 0, tmp_path)
    model = new_classifier(config.model, channels=1, num_classes=10, seed=0)
    arrays = to_arrays(model.state_dict())
    first = run_local_round(arrays, limited, None, config=config, server_round=1)
    same = run_local_round(arrays, limited, first.state, config=config, server_round=2)
    assert same.state is not None and same.state.chosen_in == 1
    changed = run_local_round(arrays, data, first.state, config=config, server_round=2)
    assert changed.state is not None and changed.state.chosen_in == 2 and data.plan is not None
    assert changed.num_examples == data.plan.num_balanced
    kept = np.bincount(data.real.labels[changed.state.kept].numpy(), minlength=10)
    assert (kept == data.plan.keep).all()
