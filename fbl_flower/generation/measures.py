"""Measures of images: what a classifier makes of them, and how near they are to training images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from fbl_flower.data.examples import Examples
from fbl_flower.errors import RunFailed

_CANDIDATES = 8  # among which the two nearest training images are looked for
_AT_ONCE = 250  # images that are compared together
_LEARNED = 0.1  # share of the way from chance to no error that a judge must have come
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
class Nearest:
    """Distances of some images to their nearest training image; `quality.SeedQuality` explains the three."""

    mean: float
    smallest: float
    copies: float


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


def check_judge(accuracy: float, *, num_classes: int) -> None:
    """Raise `RunFailed` if a judge that is right on this share of the real images has not learned to tell the classes apart."""
    chance = 1 / num_classes
    if not accuracy >= chance + _LEARNED * (1 - chance):
        raise RunFailed(
            f"the judge is right on only {100 * accuracy:.1f} % of the real images, and by chance on {100 * chance:.1f} %. "
            "It cannot measure a generator. Use more public images (data.num-public), or check the labels of the data set."
        )


def accuracy(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of the images that `classifier` gives their label."""
    return (classifier.predict(images).argmax(1) == labels).double().mean().item()


def spread(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the distance between two images of a class, averaged over pairs, then over the classes that have one."""
    means = [torch.pdist(features[labels == label].float()).mean() for label in labels.unique() if (labels == label).sum() > 1]
    return torch.stack(means).mean().item()
