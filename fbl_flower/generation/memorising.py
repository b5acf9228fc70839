"""What a generator's images tell of the images that single clients have: can those be told from images that it never saw?

A generator that memorised an image makes others near it. So for each image of a client, and for as many unseen images of the same class, the
distance to the nearest synthetic image of that class is taken. The area under the ROC curve says how well this distance alone tells the
two apart, as an attacker would who wants to know whether the client has the image (membership inference).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fbl_flower.data.examples import Examples
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.seeding import derive

_PER_CLASS = 200  # synthetic images that an attacker has of each class


@dataclass(frozen=True, kw_only=True)
class Memorising:
    """What is found for some images.

    Attributes:
        who: Whose images they are.
        num_images: How many.
        own, unseen: Mean distance (L2 over pixels in 0 .. 1) of theirs, and of unseen images, to the nearest synthetic one of the class.
        area: Under the ROC curve, 0 .. 1: the probability that one of theirs is nearer than an unseen one. 0.5: nothing is told.
    """

    who: str
    num_images: int
    own: float
    unseen: float
    area: float


def measure_memorising(
    generator: ImageGenerator, clients: Sequence[Examples], unseen: Examples, *, seed: int
) -> list[Memorising]:
    """Measure each client's images; then all images that are a client's only one of a class; then all together.

    Args:
        generator: Makes 200 images of each class.
        clients: The images of each.
        unseen: Real images that trained nothing, with at least one of each class that a client has.
        seed: Of the synthetic images.
    """
    classes = sorted({int(label) for images in (*clients, unseen) for label in images.labels.unique()})
    labels = [label for label in classes for _ in range(_PER_CLASS)]
    made = generator.generate(labels, [derive(seed, "memorising", place) for place in range(len(labels))])
    of_class = {label: _flat(made[torch.tensor(labels) == label]) for label in classes}
    reference = {label: _nearest(unseen.images[unseen.labels == label], of_class[label]) for label in classes}
    own = [torch.zeros(len(images)) for images in clients]
    alone = [torch.zeros(len(images), dtype=torch.bool) for images in clients]
    for images, distances, single in zip(clients, own, alone, strict=True):
        for label in images.labels.unique().tolist():
            where = images.labels == label
            distances[where] = _nearest(images.images[where], of_class[label])
            single[where] = int(where.sum()) == 1
    rows = [
        _row(f"client {number}", distances, images.labels, reference)
        for number, (images, distances) in enumerate(zip(clients, own, strict=True))
        if len(images)
    ]
    everything, all_labels = torch.cat(own), torch.cat([images.labels for images in clients])
    singles = torch.cat(alone)
    if bool(singles.any()):
        rows.append(_row("a client's only image of a class", everything[singles], all_labels[singles], reference))
    return [*rows, _row("all clients", everything, all_labels, reference)]


def as_table(rows: Sequence[Memorising]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| images of | number | distance to the nearest synthetic image | of unseen images | area under the ROC curve |"]
    lines += ["|---|---|---|---|---|"]
    lines += [f"| {row.who} | {row.num_images} | {row.own:.2f} | {row.unseen:.2f} | {row.area:.2f} |" for row in rows]
    return "\n".join(lines)


def _row(who: str, distances: torch.Tensor, labels: torch.Tensor, reference: dict[int, torch.Tensor]) -> Memorising:
    """Compare each distance with those of all unseen images of the same class."""
    nearer, unseen = [], []
    for distance, label in zip(distances, labels.tolist(), strict=True):
        others = reference[label]
        if len(others):
            nearer.append(float((distance < others).double().mean() + 0.5 * (distance == others).double().mean()))
            unseen.append(float(others.mean()))
    return Memorising(
        who=who,
        num_images=len(distances),
        own=float(distances.mean()),
        unseen=float(np.mean(unseen)) if unseen else float("nan"),
        area=float(np.mean(nearer)) if nearer else float("nan"),
    )


def _nearest(images: torch.Tensor, synthetic: torch.Tensor) -> torch.Tensor:
    if not len(images):
        return torch.zeros(0)
    return torch.cat([torch.cdist(some, synthetic).amin(1) for some in _flat(images).split(500)])


def _flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).float() / 255
