"""Oversampling: fill a thin class with repeats of the client's own images, without a generator."""

from __future__ import annotations

import torch

from fbl_flower.balancing.plan import BalancePlan
from fbl_flower.data.examples import Examples
from fbl_flower.seeding import numpy_stream


def repeats(plan: BalancePlan, real: Examples, *, seed: int, client: int) -> Examples:
    """Return `plan.fill[c]` repeats of the client's own images of each class c, in the order of the classes.

    Within a class each image is repeated once before any is repeated twice, in a random order each time. Repeats stay real: no
    alignment vector moves them. A class that the client lacks gets none.

    Args:
        plan: What to fill.
        real: The client's images.
        seed: The run's seed.
        client: Names the random stream.
    """
    chosen = [torch.zeros(0, dtype=torch.int64)]
    for label, number in enumerate(plan.fill.tolist()):
        own = torch.nonzero(real.labels == label).flatten()
        if len(own) and number:
            rng = numpy_stream(seed, "repeats", client, label)
            rounds = -(-number // len(own))
            order = torch.cat([torch.from_numpy(rng.permutation(len(own))) for _ in range(rounds)])
            chosen.append(own[order[:number]])
    return real.take(torch.cat(chosen))
