"""Knowledge filling (Sec. IV.B): ask a generator for the images that the plan says are missing."""

from __future__ import annotations

import math
import time
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
    seconds: float = math.inf,
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
        seconds: After so many, what is left to generate is left out; the batch under way is finished. Classes are generated in turn, so
            that all lack alike; with `own`, the missing classes come first, and the scarce ones lack more.

    Raises:
        GeneratorError: `own` is given, and the generator cannot start from images.
    """
    wanted = fill_seeds(plan, seed=seed, client=client)
    number = [n for missing in plan.fill.tolist() for n in range(missing)]  # of an image within its class
    in_turn = sorted(range(len(wanted)), key=lambda i: number[i])
    own_classes = set() if own is None else set(own.labels.tolist())
    sources: list[tuple[ImageGenerator, list[int]]] = [(generator, [i for i in in_turn if wanted[i][0] not in own_classes])]
    if own is not None and own_classes:
        if not hasattr(generator, "generate_from"):
            raise GeneratorError(
                f"generator.image-to-image: {type(generator).__name__} cannot start from images; use text-to-image, or switch it off"
            )
        variations = FromOwnImages(cast(ImageToImage, generator), own)
        sources.append((variations, [i for i in in_turn if wanted[i][0] in own_classes]))
    deadline = time.monotonic() + seconds
    images: dict[int, torch.Tensor] = {}
    for source, places in sources:
        pairs = [wanted[i] for i in places]
        made = generate_cached(
            source, cache, [c for c, _ in pairs], [s for _, s in pairs], progress=progress, deadline=deadline
        )
        there = [i for i, present in zip(places, made.present.tolist(), strict=True) if present]
        images |= dict(zip(there, made.images, strict=True))
    order = sorted(images)
    return Examples(
        images=torch.stack([images[i] for i in order]) if order else generator.generate([], []),
        labels=torch.tensor([wanted[i][0] for i in order], dtype=torch.int64),
        synthetic=torch.ones(len(order), dtype=torch.bool),
    )
