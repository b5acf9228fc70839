"""Everything that can be found wrong before a client is asked for anything."""

from __future__ import annotations

from logging import WARNING

from flwr.common.logger import log

from fbl_flower.config import RunConfig
from fbl_flower.data.corruption import believed_labels
from fbl_flower.data.datasets import load_parts, scored_part
from fbl_flower.data.partition import partition
from fbl_flower.device import pick_device
from fbl_flower.errors import ConfigError, GeneratorError
from fbl_flower.generation.loading import check_generator
from fbl_flower.training.roles import drawn_roles


def preflight(config: RunConfig, *, clients_here: bool = True) -> None:
    """Load the data, cut it, and check the generator and the device, without training or generating anything.

    Args:
        config: The run's.
        clients_here: The clients share this machine. Where they have their own, each checks its generator itself, and one that is
            not here is no more than a warning, unless the server is to generate (`warm-start`).

    Raises:
        DataError: A file is missing or damaged.
        ConfigError: Settings that do not fit the data or the machine.
        GeneratorError: The generator is missing, damaged, or made for other images.
    """
    parts = load_parts(config.data)
    problems: list[str] = []
    checks = (
        lambda: partition(believed_labels(config, parts).numpy(), config),
        lambda: scored_part(config.data, parts),
        lambda: pick_device(config),
    )
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems
    somebody_fills = any(role.capability != "none" for role in drawn_roles(config))
    needed = (config.balancing.enabled and config.balancing.filling and somebody_fills) or config.warm_start.enabled
    generator_problems = check_generator(config, parts) if needed else []
    if generator_problems and not (clients_here or config.warm_start.enabled):
        log(WARNING, "Not on this machine, and needed on each node that generates: %s", "; ".join(generator_problems))
        generator_problems = []
    if problems:
        raise ConfigError(problems + generator_problems)
    if generator_problems:
        raise GeneratorError("\n".join(generator_problems))
