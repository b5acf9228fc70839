"""Knowledge filling (Sec. IV.B): ask a generator for the images that the plan says are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from fbl_flower.balancing.own_images import FromOwnImages
from fbl_flower.balancing.plan import BalancePlan
from fbl_flower.data.examples import Examples
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.cache import ImageCache, generate_cached
from fbl_flower.generation.protocol import ImageGenerator, ImageToImage
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
    own: Examples | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """Return the client's synthetic images, `plan.fill[c]` of each class c, in the order of the classes.

    What is on the client's disk is not generated again. With `own`, a scarce class, of which the client has some images but too
    few, is filled with variations of those; a missing class is filled from nothing in any case.

    Args:
        plan: At least one image to fill.
        generator: Knows every class of the federation.
        cache: On the client's disk.
        seed: The run's seed.
        client: Number of the client.
        own: The client's real images, if its generator is to start from them.
        progress: Called with (images generated, images to generate), for each of the two kinds.

    Raises:
        GeneratorError: `own` is given, and the generator cannot start from images.
    """
    wanted = fill_seeds(plan, seed=seed, client=client)
    labels = [label for label, _ in wanted]
    if own is None or len(own) == 0:
        images = generate_cached(generator, cache, labels, [s for _, s in wanted], progress=progress).images
    else:
        if not hasattr(generator, "generate_from"):
            raise GeneratorError(
                f"generator.image-to-image: {type(generator).__name__} cannot start from images; use text-to-image, or switch it off"
            )
        images = _fill_both_ways(wanted, cast(ImageToImage, generator), cache, own, progress)
    return Examples(
        images=images,
        labels=torch.tensor(labels, dtype=torch.int64),
        synthetic=torch.ones(len(labels), dtype=torch.bool),
    )


def _fill_both_ways(
    wanted: list[tuple[int, int]],
    generator: ImageToImage,
    cache: ImageCache,
    own: Examples,
    progress: Callable[[int, int], None] | None,
) -> torch.Tensor:
    """Return an image for each (label, seed): from an image of `own` where it has that label, else from nothing."""
    present = set(own.labels.tolist())
    scarce = torch.tensor([label in present for label, _ in wanted])
    images = None
    for source, places in ((FromOwnImages(generator, own), scarce), (generator, ~scarce)):
        index = torch.nonzero(places).flatten()
        pairs = [wanted[i] for i in index.tolist()]
        if not pairs:
            continue
        made = generate_cached(
            source, cache, [label for label, _ in pairs], [seed for _, seed in pairs], progress=progress
        ).images
        images = made.new_empty((len(wanted), *made.shape[1:])) if images is None else images
        images[index] = made
    assert images is not None, "a plan that is filled has at least one image to fill"
    return images
