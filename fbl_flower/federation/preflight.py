"""Everything that can be found wrong before a client is asked for anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from logging import INFO, WARNING
from typing import TypeVar

from flwr.common.logger import log

from fbl_flower.config import AUTO, FEDERATED, RunConfig
from fbl_flower.data.corruption import believed_labels
from fbl_flower.data.datasets import DataParts, load_parts, scored_part
from fbl_flower.data.partition import partition
from fbl_flower.device import pick_device
from fbl_flower.errors import ConfigError, DataError, FBLError, GeneratorError
from fbl_flower.federation.privacy import check_accounting
from fbl_flower.generation.loading import check_generator, check_generator_files, choose_generator
from fbl_flower.models import check_model, fitted
from fbl_flower.training.central import public_examples
from fbl_flower.training.roles import drawn_roles

T = TypeVar("T")


def preflight(config: RunConfig, *, clients_here: bool = True) -> RunConfig:
    """Load the data, cut it, and check the generator and the device, without training or generating anything.

    Everything that is found is reported together. Returns the configuration with `generator.name` settled, if a generator is needed.

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

    attempt(partial(check_accounting, config))
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
    needed = generator_needed(config)
    generator_problems: list[str] = []
    if needed and parts is not None:
        name, why = choose_generator(config, parts)
        if config.generator.name == AUTO:
            log(INFO, "Generator: %s, since %s", name, why)
        config = replace(config, generator=replace(config.generator, name=name))
        if name == FEDERATED and not config.generator.path and clients_here:
            generator_problems += _check_classes(config, parts)
    if config.num_server_rounds == 0 and config.generator.name not in (AUTO, FEDERATED):
        text = f"num-server-rounds: got 0, which trains a generator only; this run would use {config.generator.name!r}. "
        found.append(ConfigError([text + "Set generator.name = 'federated'."]))
    if needed:
        generator_problems += check_generator(config, parts) if parts is not None else check_generator_files(config)
    federated = config.generator.name == FEDERATED  # the server sends it
    if generator_problems and not (clients_here or config.server_generates or federated):
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
    return config


def generator_needed(config: RunConfig) -> bool:
    """Whether anybody generates in this run, or it is for the generator alone."""
    somebody = any(role.capability != "none" for role in drawn_roles(config))
    return (config.clients_fill and somebody) or config.server_generates or config.num_server_rounds == 0


def _check_classes(config: RunConfig, parts: DataParts) -> list[str]:
    """Refuse a federated generator of classes of which the clients of a simulation have no image."""
    present = set(believed_labels(config, parts).tolist())
    lacking = [name for label, name in enumerate(parts.info.class_names) if label not in present]
    return [f"generator.name: federated, and no client has an image of {', '.join(lacking)}"] if lacking else []


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
