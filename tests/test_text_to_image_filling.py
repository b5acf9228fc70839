"""The text-to-image generator in a federation, and images that start from the client's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import quick
from small_pipelines import load

from fbl_flower.balancing.filling import fill, fill_seeds
from fbl_flower.balancing.own_images import FromOwnImages
from fbl_flower.balancing.plan import make_plan
from fbl_flower.data.examples import Examples
from fbl_flower.errors import GeneratorError
from fbl_flower.federation.local import run_local
from fbl_flower.generation.cache import ImageCache
from fbl_flower.generation.text_to_image import TextToImageGenerator
from fbl_flower.seeding import derive, numpy_stream


@pytest.fixture(scope="module")
def generator(small_made) -> TextToImageGenerator:
    return load(small_made, generator__image_to_image=True, generator__strength=0.5)


class Echo:
    """Gives back the image that it is to start from, plus one; from nothing it makes an image of the label."""

    batch_size = 3
    fingerprint, image_fingerprint = "e" * 64, "f" * 64

    def __init__(self):
        self.calls = []

    def generate(self, labels, seeds):
        self.calls.append(("nothing", list(labels)))
        return torch.tensor(labels, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)

    def generate_from(self, labels, seeds, images):
        self.calls.append(("image", list(labels)))
        return images + 1


def own(*labels: int) -> Examples:
    """Image i has the value 100 + 10 i."""
    values = torch.arange(len(labels), dtype=torch.uint8) * 10 + 100
    return Examples.real(values[:, None, None, None].repeat(1, 1, 2, 2), torch.tensor(labels))


def plan_for(examples: Examples, num_classes: int):
    return make_plan(
        np.asarray(examples.counts(num_classes)), tie_break=numpy_stream(0, "plan", 0), sampling=True, filling=True
    )


def test_scarce_classes_start_from_own_images_and_missing_ones_from_nothing(tmp_path):
    """Classes 0 to 2 with 7, 2 and 0 of 9 images, balanced to 3 each: fill 1 of class 1 and 3 of class 2."""
    examples, echo = own(0, 0, 0, 0, 0, 0, 0, 1, 1), Echo()
    plan = plan_for(examples, 3)
    assert plan.fill.tolist() == [0, 1, 3]
    filled = fill(plan, echo, ImageCache(tmp_path), seed=4, client=2, own=examples)
    assert filled.labels.tolist() == [1, 2, 2, 2] and filled.synthetic.all()
    chosen = derive(fill_seeds(plan, seed=4, client=2)[0][1], "source") % 2  # of images 7 and 8, worth 170 and 180
    assert filled.images[:, 0, 0, 0].tolist() == [(171, 181)[chosen], 2, 2, 2]
    assert sorted(echo.calls) == [("image", [1]), ("nothing", [2, 2, 2])]
    again = fill(plan, echo, ImageCache(tmp_path), seed=4, client=2, own=examples)
    assert torch.equal(again.images, filled.images) and len(echo.calls) == 2  # all from disk
    without = fill(plan, echo, ImageCache(tmp_path), seed=4, client=2)
    assert without.images[:, 0, 0, 0].tolist() == [1, 2, 2, 2]


def test_the_source_image_is_in_the_key():
    one, same = FromOwnImages(Echo(), own(0, 1)), FromOwnImages(Echo(), own(0, 1))
    other = own(0, 1)
    other.images[1, 0, 0, 0] += 1
    assert one.fingerprint == same.fingerprint
    keys = {one.fingerprint, FromOwnImages(Echo(), other).fingerprint, FromOwnImages(Echo(), own(0, 0)).fingerprint}
    assert len(keys | {Echo.fingerprint, Echo.image_fingerprint}) == 5


def test_a_class_without_own_images_is_refused():
    with pytest.raises(GeneratorError, match="no image of the class 2") as caught:
        FromOwnImages(Echo(), own(0, 1)).generate([2], [0])
    assert caught.value.public == "GeneratorError"  # the server does not learn the class


def test_a_generator_that_cannot_start_from_images_is_refused(tmp_path):
    class Plain:
        fingerprint, batch_size = "0" * 64, 1

    examples = own(0, 0, 0, 1)
    with pytest.raises(GeneratorError, match="Plain cannot start from images"):
        fill(plan_for(examples, 2), Plain(), ImageCache(tmp_path), seed=0, client=0, own=examples)


def test_an_image_made_from_an_image(generator):
    sources = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, seeds = [1, 2, 3, 4, 5], [5, 6, 7, 8, 9]
    images = generator.generate_from(labels, seeds, sources)
    assert images.dtype == torch.uint8 and images.shape == sources.shape
    assert torch.equal(generator.generate_from([5, 2], [9, 6], sources[[4, 1]]), images[[4, 1]])
    changed = generator.generate_from(labels, seeds, 255 - sources)
    assert all(not torch.equal(a, b) for a, b in zip(images, changed, strict=True))
    reseeded = generator.generate_from(labels, [seed + 10 for seed in seeds], sources)
    assert all(not torch.equal(a, b) for a, b in zip(images, reseeded, strict=True))
    with pytest.raises(TypeError, match="wanted uint8"):
        generator.generate_from([1], [2], sources)


def test_a_small_strength_still_makes_one_step(small_made):
    """Two steps at strength 0.1 are no step at all; of ten, the pipeline makes the last."""
    generator = load(small_made, generator__image_to_image=True, generator__strength=0.1)
    assert (generator._image_steps, load(small_made, generator__strength=1.0)._image_steps) == (10, 2)
    assert generator.generate_from([1], [2], torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).shape == (1, 1, 8, 8)


def federation(tmp_path: Path, made: Path, **more) -> dict:
    return quick(
        tmp_path, data__num_private=60, num_clients=2, num_server_rounds=1, fraction_train=1.0, generator__name="text-to-image",
        generator__path=str(made), generator__steps=1, generator__guidance=1.0, generator__batch_size=8, **more,
    )  # fmt: skip


@pytest.mark.parametrize("image_to_image", [False, True])
def test_a_federation_whose_clients_fill_from_text(tmp_path, small_made, image_to_image):
    outcomes = [
        run_local(federation(tmp_path / str(workers), small_made, generator__image_to_image=image_to_image), workers=workers)
        for workers in (1, 2)
    ]
    lines = [(Path(outcome.run_dir) / "metrics.jsonl").read_text().splitlines() for outcome in outcomes]
    assert lines[0] == lines[1] and json.loads(lines[0][-1])
    made_images = [{f.name for f in (tmp_path / w / "state").rglob("*") if f.is_file() and len(f.name) == 64} for w in "12"]
    assert made_images[0] == made_images[1] and len(made_images[0]) > 10
