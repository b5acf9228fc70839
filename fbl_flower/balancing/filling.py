"""Knowledge filling (Sec. IV.B): ask a generator for the images that the plan says are missing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fbl_flower.balancing.plan import BalancePlan
from fbl_flower.data.examples import Examples
from fbl_flower.generation.cache import ImageCache, generate_cached
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.seeding import derive


def fill_seeds(plan: BalancePlan, *, seed: int, client: int) -> list[tuple[int, int]]:
    """List (label, image seed) for every image to generate.

    The seed of an image follows from the run's seed, the client, the class and the image's number, so that no two clients
    share a synthetic image and a second run asks for the same ones.
    """
    return [
        (label, derive(seed, "fill", client, label, number))
        for label, missing in enumerate(plan.fill.tolist())
        for number in range(missing)
    ]


def fill(
    plan: BalancePlan,
    generator: ImageGenerator,
    cache: ImageCache,
    *,
    seed: int,
    client: int,
    progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """Return the client's synthetic images, `plan.fill[c]` of each class c, in the order of the classes.

    What is on the client's disk is not generated again.

    Args:
        plan: At least one image to fill.
        generator: Knows every class of the federation.
        cache: On the client's disk.
        seed: The run's seed.
        client: Number of the client.
        progress: Called with (images generated, images to generate).
    """
    wanted = fill_seeds(plan, seed=seed, client=client)
    labels = [label for label, _ in wanted]
    made = generate_cached(generator, cache, labels, [s for _, s in wanted], progress=progress)
    return Examples(
        images=made.images,
        labels=torch.tensor(labels, dtype=torch.int64),
        synthetic=torch.ones(len(labels), dtype=torch.bool),
    )
