"""Filling with repeats of a client's own images: which are repeated, what stays real, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from test_method_runs import results

from fbl_flower.balancing.oversampling import repeats
from fbl_flower.balancing.plan import BalancePlan, make_rich_plan
from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.data.examples import Examples, concatenate
from fbl_flower.errors import ConfigError, GeneratorError
from fbl_flower.federation.local import run_local
from fbl_flower.generation.loading import check_generator, load_generator
from fbl_flower.training.central import run_central
from fbl_flower.training.prepare import prepare_client
from fbl_flower.training.readiness import Readiness


def numbered(labels: list[int]) -> Examples:
    """Images whose one pixel is their number, 0 .. 255."""
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None]
    return Examples.real(pixels, torch.tensor(labels, dtype=torch.int64))


def plan_of(fill: list[int]) -> BalancePlan:
    return BalancePlan(keep=np.zeros(len(fill), dtype=np.int64), fill=np.array(fill))


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 20), min_size=4, max_size=4), st.integers(0, 2**40))
def test_each_once_before_any_twice(labels: list[int], fill: list[int], seed: int) -> None:
    real = numbered(labels)
    added = repeats(plan_of(fill), real, seed=seed, client=1)
    used = np.bincount(added.images.flatten().numpy(), minlength=len(labels))
    assert not added.synthetic.any() and (np.diff(added.labels.numpy()) >= 0).all()
    for label, number in enumerate(fill):
        own = [i for i, one in enumerate(labels) if one == label]
        assert (added.labels == label).sum() == (number if own else 0)
        if own:
            assert used[own].sum() == number and used[own].max() - used[own].min() <= 1


def test_repeats_follow_from_the_seed_and_the_client() -> None:
    real, plan = numbered([0] * 20 + [1] * 20), plan_of([15, 15])
    same, *others = (
        repeats(plan, real, seed=seed, client=client).images.flatten().tolist()
        for seed, client in ((0, 0), (0, 1), (1, 0), (2**32, 0))
    )
    assert same == repeats(plan, real, seed=0, client=0).images.flatten().tolist()
    assert all(other != same for other in others)
    assert same[:15] != sorted(same[:15])


@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_a_client_fills_what_it_has_and_keeps_its_number_of_images(tmp_path: Path, alpha: float) -> None:
    """Targets are as with a generator; what cannot be filled is kept in real images."""
    config = parse_config(quick(tmp_path, generator__name="own-images", data__alpha=alpha))
    with_generator = replace(config, generator=replace(config.generator, name="public-images"))
    missing = False
    for client in range(4):
        data, other = (prepare_client(c, client, cache_folder=tmp_path / "cache") for c in (config, with_generator))
        assert data.plan is not None and other.plan is not None
        counts, added = (examples.counts(10).numpy() for examples in (data.real, data.fill))
        assert (added == np.where(counts > 0, other.plan.fill, 0)).all() and (added == data.plan.fill).all()
        assert (data.plan.keep >= other.plan.keep).all() and (data.plan.keep <= counts).all()
        assert data.plan.num_balanced == len(data.real)
        assert (data.unfilled, data.generator) == (0.0, "") and not data.fill.synthetic.any()
        missing = missing or bool((counts == 0).any())
    assert missing or alpha > 0.1


def test_rich_clients_oversample_up_to_their_largest_class(tmp_path: Path) -> None:
    config = parse_config(quick(tmp_path, generator__name="own-images", clients__rich_share=1.0, data__alpha=0.1))
    for client in range(4):
        data = prepare_client(config, client, cache_folder=tmp_path / "cache")
        counts = data.real.counts(10).numpy()
        balanced = concatenate(data.real, data.fill).counts(10).numpy()
        assert (balanced == np.where(counts > 0, counts.max(), 0)).all()
        assert data.plan is not None and (data.plan.keep == make_rich_plan(counts).keep).all()
    assert not (tmp_path / "cache").exists()


def test_a_federation_needs_no_folder_and_no_room_for_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator's folder that does not exist is not looked at; nor is the disk."""
    monkeypatch.setattr(Readiness, "_remember", lambda self: pytest.fail("it asked for room on the disk"))
    settings = quick(tmp_path, generator__name="own-images", generator__path=str(tmp_path / "nowhere"), pictures=True)
    run = run_local(settings)
    assert run.summary["status"] == "completed" and not (tmp_path / "state" / "cache").exists()
    assert (run.run_dir / "class_counts.png").is_file() and not (run.run_dir / "gallery.png").exists()
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["num_examples"] == rows[-1]["num_real"]
    vectors_off = settings | {"balancing.alignment": False, "pictures": False}
    models = [load["head.weight"] for load in map(load_model, (run.run_dir, run_local(vectors_off).run_dir))]
    np.testing.assert_array_equal(*models)  # no image is synthetic, so alignment moves nothing
    assert results(run.run_dir)[1] != results(run_local(settings | {"balancing.enabled": False}).run_dir)[1]


def load_model(run_dir: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run_dir / "model.safetensors")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"warm-start.enabled": True},
            "generator.name: 'own-images' repeats a client's own images; the server has none for its warm start. Choose another "
            "generator, or warm-start.images = 'public'.",
        ),
        (
            {"balancing.filter": "model"},
            "generator.name: 'own-images' repeats a client's own images, and balancing.filter judges synthetic ones. Set balancing.filter = 'none'.",
        ),
    ],
)
def test_what_needs_synthetic_images_is_refused(keys: dict[str, bool | str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"generator.name": "own-images"} | keys)
    assert caught.value.problems == [problem]


def test_a_warm_start_on_public_images_is_allowed() -> None:
    parse_config({"generator.name": "own-images", "warm-start.enabled": True, "warm-start.images": "public"})


def test_commands_that_generate_say_that_it_makes_none(tmp_path: Path) -> None:
    config = parse_config(quick(tmp_path, generator__name="own-images"))
    problem = "generator.name: 'own-images' repeats a client's own images and makes none. Choose another generator."
    assert check_generator(config, load_parts(config.data)) == [problem]
    with pytest.raises(GeneratorError, match="makes none"):
        load_generator(config, load_parts(config.data))
    with pytest.raises(GeneratorError, match="makes none"):
        run_central(config, "synthetic")
