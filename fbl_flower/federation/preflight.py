"""Everything that can be found wrong before a client is asked for anything."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from logging import WARNING
from typing import TypeVar

from flwr.common.logger import log

from fbl_flower.config import OWN_IMAGES, RunConfig
from fbl_flower.data.corruption import believed_labels
from fbl_flower.data.datasets import load_parts, scored_part
from fbl_flower.data.partition import partition
from fbl_flower.device import pick_device
from fbl_flower.errors import ConfigError, DataError, FBLError, GeneratorError
from fbl_flower.generation.loading import check_generator, check_generator_files
from fbl_flower.models import check_model, fitted
from fbl_flower.training.central import public_examples
from fbl_flower.training.roles import drawn_roles

T = TypeVar("T")


def preflight(config: RunConfig, *, clients_here: bool = True) -> None:
    """Load the data, cut it, and check the generator and the device, without training or generating anything.

    Everything that is found is reported together.

    Args:
        config: The run's.
        clients_here: The clients share this machine. Where they have their own, each checks its generator itself, and one that is
            not here is no more than a warning, unless the server is to generate (`warm-start`, `server-tuning`).

    Raises:
        DataError: A file is missing or damaged.
        ConfigError: Settings that do not fit the data or the machine.
        GeneratorError: The generator is missing, damaged, or made for other images.
    """
    found: list[FBLError] = []

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except (ConfigError, DataError) as error:
            found.append(error)
            return None

    parts = attempt(lambda: load_parts(config.data))
    if parts is not None:
        labels = believed_labels(config, parts).numpy()
        attempt(partial(partition, labels, config))
        attempt(partial(scored_part, config.data, parts))
        if config.warm_start.enabled and config.warm_start.images == "public":
            attempt(partial(public_examples, parts))
    device = attempt(lambda: pick_device(config))
    if parts is not None and device is not None:
        attempt(partial(_check_numbers, config, parts.info.num_classes))
        network = fitted(config.model, image_size=parts.image_size, device=device)
        attempt(partial(check_model, network, image_size=parts.image_size))
    somebody_fills = any(role.capability != "none" for role in drawn_roles(config))
    fills = config.balancing.enabled and config.balancing.filling and config.generator.name != OWN_IMAGES
    needed = (fills and somebody_fills) or config.server_generates
    generator_problems: list[str] = []
    if needed:
        generator_problems = check_generator(config, parts) if parts is not None else check_generator_files(config)
    if generator_problems and not (clients_here or config.server_generates):
        log(WARNING, "Not on this machine, and needed on each node that generates: %s", "; ".join(generator_problems))
        generator_problems = []
    settings = [problem for error in found if isinstance(error, ConfigError) for problem in error.problems]
    unreadable = [str(error) for error in found if isinstance(error, DataError)]
    if unreadable:
        raise DataError("\n".join(unreadable + settings + generator_problems))
    if settings:
        raise ConfigError(settings + generator_problems)
    if generator_problems:
        raise GeneratorError("\n".join(generator_problems))


def _check_numbers(config: RunConfig, num_classes: int) -> None:
    """Refuse fewer synthetic images for the server than there are classes."""
    warm, tuning = config.warm_start, config.server_tuning
    asked = {"warm-start.num-images": warm.num_images if warm.generates else 0}
    asked["server-tuning.num-images"] = tuning.num_images if tuning.generates else 0
    problems = [
        f"{key}: expected at least one image for each of the {num_classes} classes, got {number}"
        for key, number in asked.items()
        if 0 < number < num_classes
    ]
    if problems:
        raise ConfigError(problems)
