"""A client's filter of implausible synthetic images: when it looks, under which model, and what takes the place of what falls."""

from __future__ import annotations

from dataclasses import replace

import torch

from fbl_flower.balancing.plan import limit_filling
from fbl_flower.balancing.plausibility import most_likely, near_real
from fbl_flower.config import RunConfig
from fbl_flower.data.examples import Examples
from fbl_flower.models import Classifier
from fbl_flower.seeding import numpy_stream
from fbl_flower.training.evaluation import per_image_losses, predict
from fbl_flower.training.prepare import ClientData


def choose_fill(
    model: Classifier, real: Examples, fill: Examples, *, config: RunConfig, server_round: int
) -> torch.Tensor | None:
    """Choose which synthetic images a client trains on until its next choice.

    In round 1 nothing falls: the model is random, or was trained on images of the same generator, and cannot judge either way.

    Args:
        model: As the client received it, on the device of `real` and `fill`.
        real: All of the client's images, also those that sampling sets aside.
        fill: All of its synthetic ones, also those that fell before: they may come back.
        config: Its `balancing.filter` and `balancing.filter-share`.
        server_round: From 1.

    Returns:
        bool [M], on the CPU; None where all images stay because nothing looks at them.
    """
    b = config.balancing
    if server_round <= 1 or len(fill) == 0:
        return None
    match b.filter:
        case "none":
            return None
        case "model":
            return most_likely(fill.labels, per_image_losses(model, fill), share=b.filter_share)
        case "neighbours":
            compared = real.take(torch.isin(real.labels, fill.labels).nonzero().flatten())
            return near_real(
                predict(model, fill.images)[0],
                fill.labels,
                real_features=predict(model, compared.images)[0],
                real_labels=compared.labels,
                share=b.filter_share,
            )
        case _:
            raise ValueError(f"balancing.filter: got {b.filter!r}; allowed: none | model | neighbours")


def filtered(data: ClientData, kept_fill: torch.Tensor | None, *, seed: int) -> ClientData:
    """Return a client's data with only those synthetic images that pass, and the plan that is left: real images take their place.

    So the balanced set has N_k images for as long as sampling sets real ones aside.

    Args:
        data: As prepared.
        kept_fill: bool [M] over `data.fill`; None, or of another length because more has been generated since: `data` as it is.
        seed: The run's seed.
    """
    if data.plan is None or kept_fill is None or len(kept_fill) != len(data.fill):
        return data
    fill = data.fill.take(kept_fill.nonzero().flatten())
    plan = limit_filling(
        data.plan,
        data.real.counts(data.num_classes).numpy(),
        fill.counts(data.num_classes).numpy(),
        tie_break=numpy_stream(seed, "plan", data.client),
    )
    return replace(data, plan=plan, fill=fill)


def filter_row(data: ClientData, kept_fill: torch.Tensor) -> dict[str, list[int]]:
    """Count the synthetic images of each class, made and passed, for the client's own eyes."""
    passed = data.fill.take(kept_fill.nonzero().flatten())
    return {"made": data.fill.counts(data.num_classes).tolist(), "passed": passed.counts(data.num_classes).tolist()}
