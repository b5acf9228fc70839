"""How good a generator is: is it faithful, is it diverse, and does it copy its training images?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import mean, stdev
from typing import Literal, Protocol

import torch

from fbl_flower.data.datasets import DataParts
from fbl_flower.data.examples import Examples, concatenate
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.seeding import derive

_CANDIDATES = 8  # among which the two nearest training images are looked for
_AT_ONCE = 250  # images that are compared together
_COPY_RATIO = 0.7  # an image so much nearer to one training image than to the next one is suspected of being its copy


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A trained classifier.

    Attributes:
        predict: From uint8 [N, C, H, W] to logits, float [N, K].
        features: From uint8 [N, C, H, W] to what the last layer sees, float [N, D].
    """

    predict: Callable[[torch.Tensor], torch.Tensor]
    features: Callable[[torch.Tensor], torch.Tensor]


class TrainClassifier(Protocol):
    """Trains a classifier on examples; the seed decides its first weights and the order of the images."""

    def __call__(self, examples: Examples, seed: int) -> Classifier: ...


@dataclass(frozen=True, kw_only=True)
class SeedQuality:
    """The measures under one seed; distances are L2 over pixels in 0 .. 1.

    Attributes:
        seed: Of the images and of the classifiers.
        synthetic_accuracy: On real images, of a classifier trained on synthetic images only; a share.
        public_accuracy: The same of one trained on as many public images.
        agreement: Share of the synthetic images that a classifier trained on real images gives their label.
        diversity: Mean distance of features between two synthetic images of a class, by the same of real images.
        frechet: Fréchet distance between the features of synthetic and of real images, under the classifier that judges agreement. It
            depends on the number of images: compare it for the same number and the same judge.
        nearest: Mean distance of a synthetic image to the nearest public training image.
        nearest_min: The smallest.
        copies: Share of the images that are a training image, or whose nearest one is at less than 0.7 of the distance of the second. Where
            training mirrors images, each counts as the nearer of itself and its mirror image.
        images_per_second: Of the generator, by the clock on the wall.
    """

    seed: int
    synthetic_accuracy: float
    public_accuracy: float
    agreement: float
    diversity: float
    frechet: float
    nearest: float
    nearest_min: float
    copies: float
    images_per_second: float

    @property
    def ratio(self) -> float:
        """Synthetic by public accuracy; not a number where the latter is 0."""
        return self.synthetic_accuracy / self.public_accuracy if self.public_accuracy else math.nan


_MEASURES = ("ratio", *(f.name for f in fields(SeedQuality) if f.name != "seed"))


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Distances of some images to their nearest training image; `SeedQuality` explains the three."""

    mean: float
    smallest: float
    copies: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What `measure_quality` returns.

    Attributes:
        per_seed: The measures, one for each seed.
        num_images: Synthetic images under each seed.
        evaluated_on: The part whose real images judged.
        real: Distances of those real images to the public training images: what no copying looks like.
        judge_accuracy: Share of those real images that the judge of agreement, diversity and the Fréchet distance gives their label.
        real_frechet: Fréchet distance of the public training images to those real images: what no gap looks like, but that the judge was
            trained on one side.
        num_bytes: The generator on disk; None where it was not asked for.
        peak_mb: Largest resident set of a process that makes images, in MiB; None where it was not measured.
    """

    per_seed: tuple[SeedQuality, ...]
    num_images: int
    evaluated_on: str
    real: Nearest
    judge_accuracy: float
    real_frechet: float
    num_bytes: int | None = None
    peak_mb: float | None = None

    def mean(self, measure: str) -> float:
        """Return the mean of an attribute of `SeedQuality` over the seeds."""
        return sum(getattr(one, measure) for one in self.per_seed) / len(self.per_seed)

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
            cells = [f"{number:.3f}" for number in numbers] + [_number_or_blank(reference.get(name))]
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
        numbers = [[getattr(one, name) for one in quality.per_seed] for quality in measured.values()]
        cells = [f"{mean(one):.3f}" + (f" ± {stdev(one):.3f}" if len(one) > 1 else "") for one in numbers]
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
) -> Quality:
    """Measure a generator with as many images, of the same classes, as there are public training images.

    Args:
        generator: Whose images to judge.
        parts: Its public images trained the generator, and train the classifier to compare with.
        train_classifier: Trains the same network whatever the examples.
        seeds: One set of images and of classifiers for each.
        evaluate_on: The part of the real images that judges; settings are chosen on validation, and results
            reported on test.

    Raises:
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
    real_features = judge.features(real.images)
    real_spread = _spread(real_features, real.labels)
    labels = parts.public.labels
    per_seed = []
    generator.generate([0], [0])  # loads the network, which is no part of its speed
    for seed in seeds:
        start = time.perf_counter()
        image_seeds = [derive(seed, "quality", place) for place in range(len(labels))]
        images = generator.generate(labels.tolist(), image_seeds)
        seconds = time.perf_counter() - start
        synthetic = train_classifier(
            Examples(images=images, labels=labels, synthetic=torch.ones(len(labels), dtype=torch.bool)), seed
        )
        public = train_classifier(parts.public, seed)
        nearest = nearest_training_image(images, parts.public.images, mirrored=parts.info.flip)
        features = judge.features(images)
        per_seed.append(
            SeedQuality(
                seed=seed,
                synthetic_accuracy=_accuracy(synthetic, real.images, real.labels),
                public_accuracy=_accuracy(public, real.images, real.labels),
                agreement=_accuracy(judge, images, labels),
                diversity=_spread(features, labels) / real_spread,
                frechet=frechet_distance(features, real_features),
                nearest=nearest.mean,
                nearest_min=nearest.smallest,
                copies=nearest.copies,
                images_per_second=len(labels) / seconds,
            )
        )
    return Quality(
        per_seed=tuple(per_seed),
        num_images=len(labels),
        evaluated_on=evaluate_on,
        real=nearest_training_image(real.images, parts.public.images, mirrored=parts.info.flip),
        judge_accuracy=_accuracy(judge, real.images, real.labels),
        real_frechet=frechet_distance(judge.features(parts.public.images), real_features),
    )


def nearest_training_image(images: torch.Tensor, training: torch.Tensor, *, mirrored: bool = False) -> Nearest:
    """Compare images with the training images.

    Args:
        images: uint8 [M, C, H, W].
        training: uint8 [N, C, H, W], N >= 2.
        mirrored: Whether they were also seen as in a mirror, left for right; the nearer of the two counts.
    """
    seen = [training, training.flip(3)] if mirrored else [training]
    inputs, others = images.flatten(1).float() / 255, torch.cat(seen).flatten(1).float() / 255
    found = []
    for some in inputs.split(_AT_ONCE):
        # inner products are fast and lose the small distances that matter here: they choose the candidates, exact differences judge them
        near = torch.cdist(some, others, compute_mode="use_mm_for_euclid_dist").topk(
            min(_CANDIDATES * len(seen), len(others)), largest=False
        )
        exact = (others[near.indices] - some[:, None]).square().sum(2).sqrt()
        first, place = exact.min(1)
        image = near.indices % len(training)  # the second is another training image, and not the mirrored first
        same = image == image.gather(1, place[:, None])
        found.append(torch.stack([first, exact.masked_fill(same, math.inf).amin(1)], dim=1))
    first, second = torch.cat(found).unbind(1)
    # an image that was in the training part twice has two neighbours at the same distance
    copies = ((first < _COPY_RATIO * second) | (first == 0)).double().mean()
    return Nearest(mean=first.mean().item(), smallest=first.min().item(), copies=copies.item())


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) for features float [N, D] and [M, D], N and M >= 2 (arXiv 1706.08500).

    Means m and covariances S, the latter with N - 1 in the denominator.
    """
    one, other = one.double(), other.double()
    cov_one, cov_other = torch.cov(one.T).view(one.shape[1], -1), torch.cov(other.T).view(one.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # S1 S2 has the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric
    mixed = torch.linalg.eigvalsh(root @ cov_other @ root).clamp(min=0).sqrt().sum()
    gap = (one.mean(0) - other.mean(0)).square().sum()
    return max(0.0, (gap + cov_one.trace() + cov_other.trace() - 2 * mixed).item())


def _number_or_blank(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


def _accuracy(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (classifier.predict(images).argmax(1) == labels).double().mean().item()


def _spread(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the distance between two images of a class, averaged over pairs, then over the classes that have one."""
    means = [torch.pdist(features[labels == label].float()).mean() for label in labels.unique() if (labels == label).sum() > 1]
    return torch.stack(means).mean().item()
