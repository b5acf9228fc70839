"""Which synthetic images are plausible, where the generator is poor for the domain. Ours, not the paper's; off by default.

Two checks, each class for itself: `most_likely` asks the classifier, `near_real` compares with the client's own images.
"""

from __future__ import annotations

import math

import torch


def most_likely(labels: torch.Tensor, losses: torch.Tensor, *, share: float) -> torch.Tensor:
    """Let all but a share of each class's synthetic images pass: those that the model finds least likely to be of their class fall.

    Args:
        labels: int64 [M], of the synthetic images.
        losses: float [M], their cross-entropy by H(F(I)), without P. P is learned to make the labels right, and would hide the images
            that are wrong.
        share: Of m images of a class, floor(share * m) fall, those with the highest losses; of equal ones the last. 0 .. 1.

    Returns:
        bool [M], on the CPU.
    """
    labels, losses = labels.cpu(), losses.cpu()
    passes = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        of_class = torch.nonzero(labels == label).flatten()
        likely_first = of_class[losses[of_class].argsort(stable=True)]
        passes[likely_first[: len(of_class) - math.floor(share * len(of_class) + 1e-9)]] = True
    return passes


def near_real(
    features: torch.Tensor, labels: torch.Tensor, *, real_features: torch.Tensor, real_labels: torch.Tensor, share: float
) -> torch.Tensor:
    """Let the synthetic images pass that are about as near to the client's images of their class as those are to one another.

    With d the distance of a synthetic image to the nearest real one of its class, and d_i that of real image i to the nearest other one of
    the n, the image falls if (1 + #{i: d_i >= d}) / (n + 1) <= share. That is a conformal test (arXiv 0706.3188): an image that comes from
    where the real ones do falls with probability `share` at most, as far as the features treat both alike. So a class with fewer than
    1 / share - 1 real images has no check; nor has a class with fewer than two, and a missing one.

    Args:
        features: float [M, D], of the synthetic images, by F alone.
        labels: int64 [M].
        real_features: float [N, D], of the client's real images.
        real_labels: int64 [N].
        share: 0 .. 1.

    Returns:
        bool [M], on the CPU.
    """
    passes = torch.ones(len(labels), dtype=torch.bool)
    for label in labels.unique():
        of_class, real = torch.nonzero(labels == label).flatten(), real_features[real_labels == label]
        if len(real) < 2:
            continue
        among_real = _distances(real, real).fill_diagonal_(math.inf).amin(1)
        nearest = _distances(features[of_class], real).amin(1)
        num_as_far = (among_real[None, :] >= nearest[:, None]).sum(1)
        passes[of_class.cpu()] = (1 + num_as_far > share * (len(real) + 1) + 1e-9).cpu()
    return passes


def _distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return float [N, M], Euclidean; by differences, as inner products would lose the small ones."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
