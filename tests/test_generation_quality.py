"""The measures of a generator, on images small enough to measure by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from test_generation_support import digits, two_class_parts

from fbl_flower.data.examples import Examples
from fbl_flower.errors import GeneratorError, RunFailed
from fbl_flower.generation.measures import (
    Classifier,
    Nearest,
    check_judge,
    frechet_distance,
    nearest_training_image,
    spread,
)
from fbl_flower.generation.public import PublicImages
from fbl_flower.generation.quality import Quality, SeedQuality, compare, measure_quality, sample


def centroid_classifier(examples: Examples, seed: int) -> Classifier:
    """The class whose mean image is nearest; its features are the pixels."""
    pixels = examples.images.flatten(1).float()
    means = torch.stack([pixels[examples.labels == label].mean(0) for label in examples.labels.unique()])
    return Classifier(
        predict=lambda images: -torch.cdist(images.flatten(1).float(), means), features=lambda images: images.flatten(1).float()
    )


def grey(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)


class Fixed:
    """Always draws the same image of a class."""

    fingerprint, batch_size = "f", 4

    def generate(self, labels, seeds):
        return torch.tensor([[0, 255][label] for label in labels], dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 4, 4)


def test_nearest_training_image_by_hand():
    # training at 0 and 1; 51 is 0.2 and 0.8 away (a copy), 102 is 0.4 and 0.6 (0.67 < 0.7: a copy), 120 is 0.47 and 0.53 (none)
    got = nearest_training_image(grey(51, 102, 120), grey(0, 255))
    assert got.mean == pytest.approx((51 + 102 + 120) / 255 / 3)
    assert got.smallest == pytest.approx(0.2)
    assert got.copies == pytest.approx(2 / 3)


def test_a_mirror_image_of_a_training_image_is_a_copy() -> None:
    """2 x 2 pixels, training images a and b: a's mirror image is 2 from a and root 3 from b, and no copy of either unless mirrored."""
    a, b = ([255, 0, 255, 0], [255, 0, 255, 255])
    training = torch.tensor([a, b], dtype=torch.uint8).view(2, 1, 2, 2)
    mirrored = training[:1].flip(3)
    alone, both = nearest_training_image(mirrored, training), nearest_training_image(mirrored, training, mirrored=True)
    assert (alone.mean, alone.copies) == (pytest.approx(3**0.5), 0)
    assert (both.mean, both.copies) == (0, 1)


def test_a_copy_of_an_image_that_is_there_twice_is_found() -> None:
    assert nearest_training_image(grey(51), grey(51, 51, 255)).copies == 1


def test_nearest_training_image_among_many_is_exact():
    stream = torch.Generator().manual_seed(0)
    images, training = (torch.randint(256, (num, 3, 4, 4), generator=stream, dtype=torch.uint8) for num in (300, 40))
    training[7], training[8] = images[299], images[299]
    training[8, 0, 0, 0] ^= 1  # two that differ by one grey level
    distances = torch.cdist(images.flatten(1).double() / 255, training.flatten(1).double() / 255)
    first, second = distances.topk(2, dim=1, largest=False).values.unbind(1)
    got = nearest_training_image(images, training)
    assert got.mean == pytest.approx(first.mean().item(), rel=1e-6)
    assert got.smallest == 0
    assert got.copies == pytest.approx((first < 0.7 * second).double().mean().item())
    turned = torch.cat([training, training.flip(3)]).flatten(1).double() / 255
    distances = torch.cdist(images.flatten(1).double() / 255, turned).view(300, 2, 40).amin(1)
    first, second = distances.topk(2, dim=1, largest=False).values.unbind(1)
    got = nearest_training_image(images, training, mirrored=True)
    assert got.mean == pytest.approx(first.mean().item(), rel=1e-6)
    assert got.copies == pytest.approx((first < 0.7 * second).double().mean().item())


def test_frechet_distance_by_hand():
    # one dimension: means 0 and 3, variances 2 and 8: 9 + 2 + 8 - 2 sqrt(16) = 11
    assert frechet_distance(torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]])) == pytest.approx(11)
    # two dimensions that do not mix: the sum of both; the second has variances 2 and 2, means 1 and 1: 0
    one = torch.tensor([[-1.0, 0.0], [-1.0, 2.0], [1.0, 0.0], [1.0, 2.0]])
    other = one * torch.tensor([2.0, 1.0]) + torch.tensor([3.0, 0.0])
    # variances 4/3 and 16/3: 9 + 20/3 - 2 sqrt(64/9) = 9 + 4/3
    assert frechet_distance(one, other) == pytest.approx(9 + 4 / 3)
    assert frechet_distance(other, other) == pytest.approx(0, abs=1e-9)
    few = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))  # fewer images than features
    assert frechet_distance(few, few + 1) == pytest.approx(8)


def test_spread_by_hand():
    # class 0: distances 1, 3, 2 with mean 2; class 1: 4; class 2 has no pair
    features = torch.tensor([[0.0], [1.0], [3.0], [0.0], [4.0], [7.0]])
    assert spread(features, torch.tensor([0, 0, 0, 1, 1, 2])) == pytest.approx((2 + 4) / 2)


def test_real_images_in_the_generators_place_score_as_real_and_as_copies():
    parts = digits()
    quality = measure_quality(PublicImages(parts), parts, train_classifier=centroid_classifier, seeds=(0, 1))
    assert (quality.num_images, quality.evaluated_on, len(quality.per_seed)) == (300, "test", 2)
    assert quality.mean("nearest") == 0 and quality.mean("nearest_min") == 0
    assert quality.mean("copies") == 1.0
    assert quality.real.copies < 0.2 and quality.real.mean > 0.5
    assert quality.mean("diversity") == pytest.approx(1, abs=0.05)
    assert quality.mean("ratio") == pytest.approx(1, abs=0.05)
    assert quality.mean("agreement") > 0.85 and quality.judge_accuracy > 0.8
    assert quality.per_seed[0].synthetic_accuracy != quality.per_seed[1].synthetic_accuracy  # other images under another seed
    assert quality.mean("synthetic_accuracy") == sum(one.synthetic_accuracy for one in quality.per_seed) / 2


def test_images_that_never_vary_have_no_diversity():
    parts = two_class_parts()
    noisy = Examples.real(
        torch.tensor([0, 40, 255, 215], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 1, 4, 4), torch.tensor([0, 0, 1, 1])
    )
    parts = dataclasses.replace(parts, test=noisy, validation=noisy)
    quality = measure_quality(Fixed(), parts, train_classifier=centroid_classifier, seeds=(0,))
    assert quality.mean("diversity") == 0
    assert quality.mean("ratio") == 1
    # real 40 is at sqrt(16) * 40 / 255 from black
    assert quality.real.mean == pytest.approx((0 + 0 + 2 * 4 * 40 / 255) / 4)
    # 16 pixels that are one: no gap between means, and variances of the twelve public and the four real images; the generator draws the public ones
    public, tested = 12 / 11 * 127.5**2, 2 / 3 * (127.5**2 + 87.5**2)
    assert quality.real_frechet == pytest.approx(16 * (public**0.5 - tested**0.5) ** 2, rel=1e-4) == quality.mean("frechet")


def test_validation_judges_without_the_test_part():
    parts = two_class_parts()  # its test part raises when read
    real = parts.public.take(torch.tensor([0, 1, 6, 7]))
    quality = measure_quality(
        PublicImages(parts),
        dataclasses.replace(parts, validation=real),
        train_classifier=noisy_features,
        seeds=(3,),
        evaluate_on="validation",
    )
    assert quality.evaluated_on == "validation" and quality.mean("synthetic_accuracy") == 1.0


def noisy_features(examples: Examples, seed: int) -> Classifier:
    """As `centroid_classifier`, with features that tell equal images apart: real spread must not be zero."""
    plain = centroid_classifier(examples, seed)
    return Classifier(predict=plain.predict, features=lambda images: torch.arange(len(images)).float()[:, None])


def test_the_table_has_every_measure_and_every_seed():
    parts = digits()
    quality = measure_quality(PublicImages(parts), parts, train_classifier=centroid_classifier, seeds=(4, 7))
    table = dataclasses.replace(quality, num_bytes=4321, peak_mb=87.6).as_markdown().splitlines()
    assert table[0] == "| 300 images, against test | mean | seed 4 | seed 7 | real |"
    assert {line.count("|") for line in table} == {6}
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == [
        "ratio", "synthetic accuracy", "real accuracy", "agreement", "diversity", "frechet", "nearest", "nearest min", "copies",
        "images per second", "sampling", "bytes on disk", "peak memory, MiB",
    ]  # fmt: skip
    assert table[10].startswith("| copies | 1.000 | 1.000 | 1.000 | 0.")
    assert table[-2:] == ["| bytes on disk | 4321 |  |  |  |", "| peak memory, MiB | 88 |  |  |  |"]


def test_generators_side_by_side():
    def quality(*accuracies: float, num_bytes: int | None) -> Quality:
        seeds = tuple(
            SeedQuality(
                seed=seed, synthetic_accuracy=accuracy, real_accuracy=0.8, agreement=1.0, diversity=1.0, frechet=2.0, nearest=3.0,
                nearest_min=1.0, copies=0.0, images_per_second=9.0,
            )
            for seed, accuracy in enumerate(accuracies)
        )  # fmt: skip
        return Quality(
            per_seed=seeds,
            num_images=5,
            evaluated_on="test",
            real=Nearest(mean=0, smallest=0, copies=0),
            judge_accuracy=0.9,
            real_frechet=0.25,
            num_bytes=num_bytes,
        )

    table = compare({"a": quality(0.5, 0.7, num_bytes=12), "b": quality(0.4, num_bytes=None)}).splitlines()
    assert table[0] == "| 5 images, against test | a | b | real |"
    assert table[2] == "| ratio | 0.750 ± 0.177 | 0.500 |  |"
    assert table[3] == "| synthetic accuracy | 0.600 ± 0.141 | 0.400 |  |"
    assert table[5] == "| agreement | 1.000 ± 0.000 | 1.000 | 0.900 |"
    assert table[7] == "| frechet | 2.000 ± 0.000 | 2.000 | 0.250 |"
    assert table[-2:] == ["| bytes on disk | 12 |  |  |", "| peak memory, MiB |  |  |  |"]


def test_no_seeds_and_no_images_are_refused():
    parts = digits()
    with pytest.raises(GeneratorError, match="got 0 seeds"):
        measure_quality(PublicImages(parts), parts, train_classifier=centroid_classifier, seeds=())
    one_of_each = dataclasses.replace(
        parts, test=parts.test.take(torch.tensor([int((parts.test.labels == c).nonzero()[0]) for c in range(10)]))
    )
    with pytest.raises(
        GeneratorError, match=r"at most 1 test images and \d+ public ones of a class; wanted at least 1, 2 and 2"
    ):
        measure_quality(PublicImages(parts), one_of_each, train_classifier=centroid_classifier)


def test_an_undefined_measure_is_none_in_json_and_blank_in_tables():
    """Real images that are all alike have no spread; a network that is never right has no ratio."""
    parts = two_class_parts()
    same = Examples.real(
        torch.tensor([0, 0, 255, 255], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 1, 4, 4), torch.tensor([0, 0, 1, 1])
    )
    parts = dataclasses.replace(parts, test=same, validation=same)
    quality = measure_quality(Fixed(), parts, train_classifier=centroid_classifier, seeds=(0, 1))
    assert quality.mean("diversity") is None and quality.mean("ratio") == 1
    written = json.loads(json.dumps(quality.as_json(), allow_nan=False))
    assert written["mean"]["diversity"] is None and [one["diversity"] for one in written["per_seed"]] == [None, None]
    assert [one["ratio"] for one in written["per_seed"]] == [1, 1] and written["judge_accuracy"] == 1
    assert "| diversity |  |  |  | 1.000 |" in quality.as_markdown().splitlines()
    assert "| diversity |  |  | 1.000 |" in compare({"a": quality, "b": quality}).splitlines()
    never = dataclasses.replace(quality.per_seed[0], real_accuracy=0.0)
    assert never.ratio is None and dataclasses.replace(quality, per_seed=(never, *quality.per_seed)).mean("ratio") is None


@pytest.mark.parametrize(
    ("num_classes", "accuracy", "learned"), [(10, 0.18, False), (10, 0.2, True), (2, 0.54, False), (2, 0.56, True)]
)
def test_a_judge_must_be_better_than_chance(num_classes, accuracy, learned):
    """A tenth of the way from chance: 0.1 + 0.09 of ten classes, 0.5 + 0.05 of two."""
    if learned:
        check_judge(accuracy, num_classes=num_classes)
        return
    with pytest.raises(RunFailed, match=f"right on only {100 * accuracy:.1f} % .* by chance on {100 / num_classes:.1f} %"):
        check_judge(accuracy, num_classes=num_classes)


def test_nothing_is_generated_for_a_judge_that_has_not_learned():
    def blind(examples: Examples, seed: int) -> Classifier:
        return Classifier(
            predict=lambda images: torch.ones(len(images), 10), features=lambda images: torch.ones(len(images), 2)
        )

    class Unused:
        def generate(self, labels, seeds):
            pytest.fail("worked")

    with pytest.raises(RunFailed, match="cannot measure a generator"):
        measure_quality(Unused(), digits(), train_classifier=blind)


def test_a_part_of_the_public_labels_is_drawn_without_repetition():
    parts = two_class_parts()
    assert sample(parts.public).labels.tolist() == sample(parts.public, 12).labels.tolist() == [0] * 6 + [1] * 6
    some = sample(parts.public, 11).labels
    assert len(some) == 11 and some.sum() in (5, 6) and some.tolist() == sample(parts.public, 11).labels.tolist()
    with pytest.raises(GeneratorError, match="expected at most 12 images, one for each public image, got 13"):
        sample(parts.public, 13)
