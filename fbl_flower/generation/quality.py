"""How good a generator is: is it faithful, is it diverse, and does it copy its training images?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import mean, stdev
from typing import Any, Literal

import torch

from fbl_flower.data.datasets import DataParts
from fbl_flower.data.examples import Examples, concatenate
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.measures import (
    Nearest,
    TrainClassifier,
    accuracy,
    check_judge,
    frechet_distance,
    nearest_training_image,
    spread,
)
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.seeding import derive, numpy_stream


@dataclass(frozen=True, kw_only=True)
class SeedQuality:
    """The measures under one seed; distances are L2 over pixels in 0 .. 1.

    Attributes:
        seed: Of the images and of the classifiers.
        synthetic_accuracy: On real images, of a classifier trained on synthetic images only; a share.
        real_accuracy: The same of one trained on as many of the real images that trained the generator.
        agreement: Share of the synthetic images that a classifier trained on real images gives their label.
        diversity: Mean distance of features between two synthetic images of a class, by the same of real images; None
            where the real ones do not differ.
        frechet: Fréchet distance between the features of synthetic and of real images, under the classifier that judges agreement. It
            depends on the number of images: compare it for the same number and the same judge.
        nearest: Mean distance of a synthetic image to the nearest image that trained the generator.
        nearest_min: The smallest.
        copies: Share of the images that are a training image, or whose nearest one is at less than 0.7 of the distance of the second. Where
            training mirrors images, each counts as the nearer of itself and its mirror image.
        images_per_second: Of the generator, by the clock on the wall.
    """

    seed: int
    synthetic_accuracy: float
    real_accuracy: float
    agreement: float
    diversity: float | None
    frechet: float
    nearest: float
    nearest_min: float
    copies: float
    images_per_second: float

    @property
    def ratio(self) -> float | None:
        """Synthetic by real accuracy; None where the latter is 0."""
        return self.synthetic_accuracy / self.real_accuracy if self.real_accuracy else None


_MEASURES = ("ratio", *(f.name for f in fields(SeedQuality) if f.name != "seed"))


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What `measure_quality` returns.

    Attributes:
        per_seed: The measures, one for each seed.
        num_images: Synthetic images under each seed.
        evaluated_on: The part of the real images that everything was measured on.
        real: Distances of those real images to the ones that trained the generator: what no copying looks like.
        judge_accuracy: Share of those real images that the judge of agreement, diversity and the Fréchet distance gives their label.
        real_frechet: Fréchet distance of the real images that synthetic ones are compared with to those real images: what no gap looks like, but that the judge was
            trained on one side.
        sampling: The steps and the guidance of the generator, as text; empty where it has none.
        num_bytes: The generator on disk; None where it was not asked for.
        peak_mb: Largest resident set of a process that makes images, in MiB; None where it was not measured.
    """

    per_seed: tuple[SeedQuality, ...]
    num_images: int
    evaluated_on: str
    real: Nearest
    judge_accuracy: float
    real_frechet: float
    sampling: str = ""
    num_bytes: int | None = None
    peak_mb: float | None = None

    def values(self, measure: str) -> list[float] | None:
        """Return an attribute of `SeedQuality` for each seed; None where it is undefined for one of them."""
        found = [getattr(one, measure) for one in self.per_seed]
        return None if None in found else found

    def mean(self, measure: str) -> float | None:
        """Return the mean of an attribute of `SeedQuality` over the seeds; None where it is undefined for one of them."""
        found = self.values(measure)
        return None if found is None else mean(found)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON; an undefined measure is None."""
        seeds = [{"ratio": one.ratio} | asdict(one) for one in self.per_seed]
        return asdict(self) | {"per_seed": seeds, "mean": {name: self.mean(name) for name in _MEASURES}}

    def of_real(self) -> dict[str, float]:
        """Return what real images have in the place of synthetic ones, by measure; those without such a number are left out."""
        return {
            "agreement": self.judge_accuracy,
            "diversity": 1.0,
            "frechet": self.real_frechet,
            "nearest": self.real.mean,
            "nearest_min": self.real.smallest,
            "copies": self.real.copies,
        }

    def costs(self) -> dict[str, str]:
        """Return what does not depend on a seed, by name, as text; empty where it is not known."""
        return {
            "sampling": self.sampling,
            "bytes on disk": "" if self.num_bytes is None else str(self.num_bytes),
            "peak memory, MiB": "" if self.peak_mb is None else f"{self.peak_mb:.0f}",
        }

    def as_markdown(self) -> str:
        """Return a table with a row for each measure: mean, one column per seed, real images for comparison."""
        reference = self.of_real()
        seeds = [f"seed {one.seed}" for one in self.per_seed]
        rows = [
            "| " + " | ".join([f"{self.num_images} images, against {self.evaluated_on}", "mean", *seeds, "real"]) + " |",
            "|" + "---|" * (len(seeds) + 3),
        ]
        for name in _MEASURES:
            numbers = [self.mean(name), *(getattr(one, name) for one in self.per_seed)]
            cells = [_number_or_blank(number) for number in [*numbers, reference.get(name)]]
            rows.append("| " + " | ".join([name.replace("_", " "), *cells]) + " |")
        rows += ["| " + " | ".join([name, cost, *[""] * (len(seeds) + 1)]) + " |" for name, cost in self.costs().items()]
        return "\n".join(rows)


def compare(measured: Mapping[str, Quality]) -> str:
    """Return a table with a column for each generator, mean and sample standard deviation over the seeds, and real images for comparison.

    Args:
        measured: At least one, by name; all measured with as many images, against the same part, by the same judge.
    """
    first = next(iter(measured.values()))
    reference = first.of_real()
    heads = [f"{first.num_images} images, against {first.evaluated_on}", *measured, "real"]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in _MEASURES:
        cells = [_mean_and_deviation(quality.values(name)) for quality in measured.values()]
        rows.append("| " + " | ".join([name.replace("_", " "), *cells, _number_or_blank(reference.get(name))]) + " |")
    rows += ["| " + " | ".join([name, *(one.costs()[name] for one in measured.values()), ""]) + " |" for name in first.costs()]
    return "\n".join(rows)


def measure_quality(
    generator: ImageGenerator,
    parts: DataParts,
    *,
    train_classifier: TrainClassifier,
    seeds: Sequence[int] = (0, 1, 2),
    evaluate_on: Literal["test", "validation"] = "test",
    trained_on: Examples | None = None,
) -> Quality:
    """Measure a generator with as many images as there are public training images, of the classes of those that trained it.

    Args:
        generator: Whose images to judge.
        parts: The data set; public and validation images train the judge of agreement, diversity and the Fréchet distance.
        train_classifier: Trains the same network whatever the examples.
        seeds: One set of images and of classifiers for each.
        evaluate_on: The part of the real images that judges; settings are chosen on validation, and results
            reported on test.
        trained_on: What trained the generator; by default the public images. As many of them as there are synthetic images train
            the classifier to compare with.

    Raises:
        RunFailed: The judge has not learned (`check_judge`).
        GeneratorError: No seed, or no two real images of a class in the part that judges, or among those that are public.
    """
    real = parts.test if evaluate_on == "test" else parts.validation
    most = [int(part.counts(parts.info.num_classes).max()) for part in (real, parts.public)]
    if not seeds or min(most) < 2:
        raise GeneratorError(
            f"quality of a generator: got {len(seeds)} seeds, and at most {most[0]} {evaluate_on} images and {most[1]} public ones of a class; "
            f"wanted at least 1, 2 and 2 (data.num-{evaluate_on}, data.num-public)"
        )
    train = parts.public if evaluate_on == "validation" else concatenate(parts.public, parts.validation)
    judge = train_classifier(train, derive(seeds[0], "judge"))
    judge_accuracy = accuracy(judge, real.images, real.labels)
    check_judge(judge_accuracy, num_classes=parts.info.num_classes)
    real_features = judge.features(real.images)
    real_spread = spread(real_features, real.labels)
    seen = parts.public if trained_on is None else trained_on
    compared = sample(seen, min(len(seen), len(parts.public)))
    labels = compared.labels
    per_seed = []
    for seed in seeds:
        made = make_images(generator, labels, seed)
        images = made.examples.images
        synthetic, of_real = train_classifier(made.examples, seed), train_classifier(compared, seed)
        nearest = nearest_training_image(images, seen.images, mirrored=parts.info.flip)
        features = judge.features(images)
        per_seed.append(
            SeedQuality(
                seed=seed,
                synthetic_accuracy=accuracy(synthetic, real.images, real.labels),
                real_accuracy=accuracy(of_real, real.images, real.labels),
                agreement=accuracy(judge, images, labels),
                diversity=spread(features, labels) / real_spread if real_spread else None,
                frechet=frechet_distance(features, real_features),
                nearest=nearest.mean,
                nearest_min=nearest.smallest,
                copies=nearest.copies,
                images_per_second=len(labels) / made.seconds,
            )
        )
    return Quality(
        per_seed=tuple(per_seed),
        num_images=len(labels),
        evaluated_on=evaluate_on,
        real=nearest_training_image(real.images, seen.images, mirrored=parts.info.flip),
        judge_accuracy=judge_accuracy,
        real_frechet=frechet_distance(judge.features(compared.images), real_features),
    )


def sample(examples: Examples, number: int = 0) -> Examples:
    """Return the real images whose labels synthetic ones get, to be compared with them: some drawn ones.

    Args:
        examples: Real images.
        number: How many to draw; 0, or as many as there are: all, in their order.

    Raises:
        GeneratorError: There are fewer.
    """
    if number > len(examples):
        raise GeneratorError(
            f"quality of a generator: expected at most {len(examples)} images, one for each public image, got {number}. "
            "Raise data.num-public."
        )
    if number in (0, len(examples)):
        return examples
    order = numpy_stream(0, "quality", "labels").permutation(len(examples))
    return examples.take(torch.from_numpy(order[:number].copy()))


@dataclass(frozen=True, kw_only=True)
class Made:
    """Synthetic images, and the seconds by the clock on the wall that they took."""

    examples: Examples
    seconds: float


def make_images(generator: ImageGenerator, labels: torch.Tensor, seed: int) -> Made:
    """Make an image for each label. Under one seed, every generator gets the same seeds of images."""
    generator.generate([0], [0])  # loads the network, which is no part of its speed
    start = time.perf_counter()
    seeds = [derive(seed, "quality", place) for place in range(len(labels))]
    images = generator.generate(labels.tolist(), seeds)
    seconds = time.perf_counter() - start
    synthetic = torch.ones(len(labels), dtype=torch.bool)
    return Made(examples=Examples(images=images, labels=labels, synthetic=synthetic), seconds=seconds)


def _mean_and_deviation(numbers: list[float] | None) -> str:
    if numbers is None:
        return ""
    return f"{mean(numbers):.3f}" + (f" ± {stdev(numbers):.3f}" if len(numbers) > 1 else "")


def _number_or_blank(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"
