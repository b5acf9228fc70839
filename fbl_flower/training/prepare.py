"""What a client does on start-up: count, plan, and fill, so that a round finds its data ready."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fbl_flower.balancing.filling import fill
from fbl_flower.balancing.oversampling import repeats
from fbl_flower.balancing.plan import BalancePlan, cap_filling, limit_filling, make_plan, make_rich_plan
from fbl_flower.config import OWN_IMAGES, DataConfig, GeneratorConfig, RunConfig
from fbl_flower.data.client_folder import client_folder_parts
from fbl_flower.data.corruption import believed_labels, private_examples
from fbl_flower.data.datasets import DataParts, load_parts
from fbl_flower.data.examples import Examples
from fbl_flower.data.partition import partition
from fbl_flower.generation.cache import ImageCache
from fbl_flower.generation.loading import load_generator
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.seeding import numpy_stream
from fbl_flower.training.attack import with_hostile_labels
from fbl_flower.training.loop import Augmentation
from fbl_flower.training.roles import drawn_roles

# Two threads must not both load the generator.
_LOADING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """A client's own images, its plan, and the synthetic images that the plan asked for.

    Attributes:
        client: Number of the client, 0 .. num-clients - 1.
        num_classes: Classes of the federation, including those that this client lacks.
        real: The client's images.
        plan: None for a client that does not balance.
        fill: Synthetic images, or repeats of real ones, `plan.fill[c]` of each class c; empty without a plan. Where time for generating ran out, the plan
            is that for what there is.
        augmentation: How training images may be varied.
        unfilled: Share of the planned synthetic images that time did not allow to make, 0 .. 1.
        generator: Fingerprint of what made the synthetic images; empty where none were planned.
    """

    client: int
    num_classes: int
    real: Examples
    plan: BalancePlan | None
    fill: Examples
    augmentation: Augmentation
    unfilled: float = 0.0
    generator: str = ""


def prepare_client(
    config: RunConfig,
    client: int,
    *,
    cache_folder: Path,
    own_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    capability: str = "",
    check: Callable[[DataParts, Examples], None] | None = None,
    may_generate: bool = True,
) -> ClientData:
    """Load a client's images, plan its balanced set, and generate what is missing and not yet on its disk.

    Args:
        config: The run's configuration.
        client: 0 .. num-clients - 1.
        cache_folder: Folder of the client's image cache.
        own_folder: The client's own images, in place of a share of the private part.
        progress: Called with (images generated, images to generate).
        capability: full, rich or none; empty: as the run's seed draws it.
        check: Called with the data set and the client's images before anything is generated; may refuse by an error.
        may_generate: Without it, only what is on the disk already is used: time for generating has run out, or nobody should wait.
    """
    parts, real = client_images(config, client, own_folder)
    capability = capability or drawn_roles(config)[client].capability
    if check is not None:
        check(parts, real)
    plan = client_plan(config, real, parts.info.num_classes, client, capability=capability)
    added, unfilled, fingerprint = real.take(torch.zeros(0, dtype=torch.int64)), 0.0, ""
    if plan is not None and plan.fill.sum() > 0:
        if config.generator.name == OWN_IMAGES:
            added = repeats(plan, real, seed=config.seed, client=client)
        else:
            budget, generator = config.generator.time_budget, shared_generator(config, own_folder)
            fingerprint = generator.fingerprint
            added = fill(
                plan,
                generator,
                ImageCache(cache_folder),
                seed=config.seed,
                client=client,
                own=real if config.generator.image_to_image else None,
                progress=progress,
                seconds=(budget or math.inf) if may_generate else 0.0,
            )
            unfilled = 1 - len(added) / int(plan.fill.sum())
        counts, made = (examples.counts(parts.info.num_classes).numpy() for examples in (real, added))
        plan = limit_filling(plan, counts, made, tie_break=numpy_stream(config.seed, "plan", client))
    return ClientData(
        client=client,
        num_classes=parts.info.num_classes,
        real=real,
        plan=plan,
        fill=added,
        augmentation=augmentation_of(parts),
        unfilled=unfilled,
        generator=fingerprint,
    )


def client_images(config: RunConfig, client: int, own_folder: Path | None = None) -> tuple[DataParts, Examples]:
    """Return the data set as a client sees it, and the client's own images; a process reads them once."""
    return _client_images(replace(config, generator=GeneratorConfig()), client, own_folder)


@functools.lru_cache(maxsize=128)
def _client_images(config: RunConfig, client: int, own_folder: Path | None) -> tuple[DataParts, Examples]:
    parts = _parts(config, own_folder)
    return parts, parts.private if own_folder else client_examples(config, parts, client)


def forget_images() -> None:
    """Have this process read the clients' images again."""
    _client_images.cache_clear()
    _own_parts.cache_clear()


def client_examples(config: RunConfig, parts: DataParts, client: int) -> Examples:
    """Return the private images of one client, as it has them (`data.noise`, `data.wrong-labels`, `attack`)."""
    owned = partition(believed_labels(config, parts).numpy(), config)[client]
    return with_hostile_labels(config, private_examples(config, parts, torch.from_numpy(owned)), parts.info.num_classes, client)


def client_plan(
    config: RunConfig, real: Examples, num_classes: int, client: int, *, capability: str = "full"
) -> BalancePlan | None:
    """Return the client's plan, or None where balancing is off or the client cannot generate."""
    if not config.balancing.enabled or capability == "none":
        return None
    counts, stream = real.counts(num_classes).numpy(), functools.partial(numpy_stream, config.seed, "plan", client)
    b = config.balancing
    if capability == "rich":
        plan = make_rich_plan(counts, filling=b.filling)
    else:
        plan = make_plan(counts, tie_break=stream(), sampling=b.sampling != "none", filling=b.filling)
    allowed = cap_filling(plan, counts, share=b.max_filled_share, tie_break=stream())
    return limit_filling(plan, counts, allowed, tie_break=stream())


def augmentation_of(parts: DataParts) -> Augmentation:
    """Return the data set's augmentation, its shift scaled to the image size in use."""
    info = parts.info
    return Augmentation(shift=round(info.shift * parts.image_size / info.image_size), flip=info.flip)


def shared_generator(config: RunConfig, own_folder: Path | None = None) -> ImageGenerator:
    """Load the run's generator once per process; several clients of a simulation share it."""
    with _LOADING:
        return _load_once(config, own_folder)


@functools.lru_cache(maxsize=1)
def _load_once(config: RunConfig, own_folder: Path | None) -> ImageGenerator:
    return load_generator(config, _parts(config, own_folder))


def _parts(config: RunConfig, own_folder: Path | None) -> DataParts:
    return _own_parts(config.data, own_folder) if own_folder else load_parts(config.data)


@functools.lru_cache(maxsize=128)
def _own_parts(config: DataConfig, own_folder: Path) -> DataParts:
    return client_folder_parts(config, own_folder)
