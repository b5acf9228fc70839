"""Both generators keep the contract of `ImageGenerator`."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_generation_support import digits, tiny_generator

from fbl_flower.data.examples import Examples
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.diffusion import DiffusionGenerator
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.generation.public import PublicImages, blurred

LABELS = [3, 1, 4, 1, 5, 9, 2]
SEEDS = [10, 11, 2**63 - 1, 13, 0, 15, 16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module", params=["diffusion", "guided", "public-images"])
def generator(request, folder) -> ImageGenerator:
    match request.param:
        case "diffusion":
            return DiffusionGenerator.load(folder, steps=2, guidance=1.0, batch_size=4)
        case "guided":
            return DiffusionGenerator.load(folder, steps=2, guidance=2.0, batch_size=4)
        case _:
            return PublicImages(digits(), batch_size=4)


def test_images_have_the_promised_type_and_shape(generator):
    images = generator.generate(LABELS, SEEDS)
    assert images.dtype == torch.uint8
    assert images.shape == (7, 1, 8, 8)
    assert images.min() < 64 and images.max() > 192  # the range is used, so it is not -1 .. 1 cut to integers
    assert generator.generate([], []).shape == (0, 1, 8, 8)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_an_image_does_not_depend_on_its_neighbours(generator, places):
    whole = generator.generate(LABELS, SEEDS)
    again = generator.generate([LABELS[p] for p in places], [SEEDS[p] for p in places])
    assert torch.equal(again, whole[places])


def test_the_seed_decides_the_image(generator):
    images = generator.generate([7] * 12, list(range(12)))
    assert len({image.numpy().tobytes() for image in images}) >= 10  # a choice among 30 may fall on the same image twice


def test_the_label_decides_the_image(generator):
    images = generator.generate(list(range(10)), [5] * 10)
    assert len({image.numpy().tobytes() for image in images}) == 10


def test_no_global_randomness_is_used(generator):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generator.generate([2], [3])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(generator.generate([2], [3]), first)


@pytest.mark.parametrize(
    ("labels", "seeds", "message"),
    [
        ([10], [0], "got the label 10; wanted 0 to 9"),
        ([-1], [0], "got the label -1; wanted 0 to 9"),
        ([0], [-1], "got the seed -1"),
        ([0], [2**63], "got the seed 9223372036854775808"),
        ([0, 1], [0], "got 2 labels and 1 seeds"),
    ],
)
def test_impossible_requests_are_refused(generator, labels, seeds, message):
    with pytest.raises(GeneratorError, match=message) as caught:
        generator.generate(labels, seeds)
    assert caught.value.public == "GeneratorError"  # the server does not learn which class was wanted


def test_public_images_hands_out_training_images_of_the_class():
    parts = digits()
    images = PublicImages(parts).generate([4] * 40, list(range(40)))
    four = parts.public.images[parts.public.labels == 4]
    assert all((image == four).flatten(1).all(1).any() for image in images)


def test_degraded_public_images_are_the_same_ones_blurred_then_noisy():
    """Plain, then with noise only: the difference has the standard deviation asked for, where nothing is clipped."""
    parts = digits()
    labels, seeds = [4, 7, 4], [3, 8, 3]
    plain = PublicImages(parts).generate(labels, seeds)
    soft = PublicImages(parts, blur=1.0).generate(labels, seeds)
    assert torch.equal(soft, (255 * blurred(plain.float() / 255, 1.0)).round().to(torch.uint8))
    both = PublicImages(parts, blur=1.0, noise=0.1)
    made = both.generate(labels, seeds)
    assert torch.equal(made[0], made[2]) and torch.equal(
        made[1:2], both.generate([7], [8])
    )  # the seed decides, not the company
    many = PublicImages(parts, noise=0.1).generate([4] * 300, list(range(300))).float()
    base = PublicImages(parts).generate([4] * 300, list(range(300))).float()
    middle = (base > 90) & (base < 165)
    assert (many - base)[middle].std().item() == pytest.approx(25.5, rel=0.05)


def test_a_blur_by_hand():
    """One bright pixel, deviation 1: weights exp(-k^2/2) / 2.5066; in each direction, 1/2.5066 stays. Borders go on outside."""
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1
    soft = blurred(image, 1.0)
    total = 1 + 2 * sum(math.exp(-0.5 * k * k) for k in (1, 2, 3))
    assert soft[0, 0, 4, 4].item() == pytest.approx(1 / total**2)
    assert soft[0, 0, 4, 6].item() == pytest.approx(math.exp(-2) / total**2)
    assert soft.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(blurred(torch.full((2, 3, 5, 5), 0.3), 4.0), torch.tensor(0.3))


def test_a_fingerprint_of_degraded_public_images_is_another():
    parts = digits()
    prints = {PublicImages(parts, blur=blur, noise=noise).fingerprint for blur in (0.0, 1.0, 2.0) for noise in (0.0, 0.1)}
    assert len(prints) == 6
    assert PublicImages(parts).fingerprint == hashlib.sha256(f"public-images/{parts.public_sha256}".encode()).hexdigest()


def test_public_images_names_the_class_that_it_lacks():
    parts = digits()
    lacking = parts.public.take(torch.nonzero(parts.public.labels != 8).flatten())
    generator = PublicImages(replace(parts, public=lacking))
    assert generator.generate([7], [0]).shape == (1, 1, 8, 8)
    with pytest.raises(GeneratorError, match="no public image of the class 'eight'.*data.num-public"):
        generator.generate([8], [0])


def test_the_fingerprint_covers_what_decides_the_pixels(folder):
    settings = {"steps": 2, "guidance": 1.0, "batch_size": 4}
    variants = [settings, settings | {"steps": 3}, settings | {"guidance": 1.5}, settings | {"batch_size": 5}]
    prints = [DiffusionGenerator.load(folder, **variant).fingerprint for variant in variants]
    assert len(set(prints)) == 4
    assert prints[0] == DiffusionGenerator.load(folder, **settings).fingerprint
    parts = digits()
    public = Examples.real(parts.public.images.clone(), parts.public.labels)
    public.images[0, 0, 0, 0] += 1
    other = replace(parts, public=public)
    assert PublicImages(parts).fingerprint != PublicImages(other).fingerprint


def test_guidance_one_is_the_network_alone(folder):
    plain = DiffusionGenerator.load(folder, steps=3, guidance=1.0, batch_size=4)
    nearly = DiffusionGenerator.load(folder, steps=3, guidance=1.0 + 1e-9, batch_size=4)
    difference = plain.generate(LABELS, SEEDS).int() - nearly.generate(LABELS, SEEDS).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"guidance": 0.5}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(folder, wrong):
    with pytest.raises(GeneratorError, match="wanted 1 or more"):
        DiffusionGenerator.load(folder, **({"steps": 2, "guidance": 1.0, "batch_size": 4} | wrong))
