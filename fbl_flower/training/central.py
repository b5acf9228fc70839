"""Training without a federation: the warm start, and the rows that a federation has to beat."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fbl_flower.config import RunConfig, rounded_up
from fbl_flower.data.datasets import DataParts, load_parts, scored_part
from fbl_flower.data.examples import Examples
from fbl_flower.device import pick_device
from fbl_flower.errors import ConfigError, RunFailed
from fbl_flower.generation.cache import ImageCache, generate_cached
from fbl_flower.models import Classifier, fitted, new_classifier
from fbl_flower.seeding import derive, torch_stream
from fbl_flower.training.evaluation import evaluate
from fbl_flower.training.loop import train
from fbl_flower.training.prepare import augmentation_of, shared_generator
from fbl_flower.training.schedule import epoch_factors


def train_centrally(config: RunConfig, parts: DataParts, examples: Examples, *, epochs: int, seed: int) -> Classifier:
    """Train the run's classifier on `examples`, with the clients' own step size, batch size and augmentation.

    Args:
        config: Its `model`, `train` and `device`.
        parts: The data set that the examples are of.
        examples: At least one image.
        epochs: Passes over them, in place of `train.epochs`.
        seed: Of the weights, the order and the augmentation.
    """
    device = pick_device(config)
    network = fitted(config.model, image_size=parts.image_size, device=device)
    model = new_classifier(network, channels=parts.info.channels, num_classes=parts.info.num_classes, seed=seed).to(device)
    train_further(model, config, parts, examples, epochs=epochs, rng=torch_stream(seed, "central"))
    return model


def train_further(
    model: Classifier,
    config: RunConfig,
    parts: DataParts,
    examples: Examples,
    *,
    epochs: int,
    rng: torch.Generator,
    what: str = "training without a federation",
) -> None:
    """Train a model in place, where it is, as `train_centrally` does.

    Args:
        model: On any device.
        config: Its `train`.
        parts: The data set that the examples are of.
        examples: At least one image.
        epochs: Passes over them, in place of `train.epochs`; the schedule runs over these.
        rng: CPU generator of order and augmentation.
        what: Names the training in an error.

    Raises:
        RunFailed: The loss is not finite.
    """
    trained = train(
        model,
        examples.to(next(model.parameters()).device),
        config=replace(config.train, epochs=epochs),
        augmentation=augmentation_of(parts),
        rng=rng,
        epoch_factors=epoch_factors(config.train.schedule, epochs),
    )
    if not (math.isfinite(trained.loss) and all(bool(p.isfinite().all()) for p in model.parameters())):
        raise RunFailed(f"{what}: the loss or the model is not finite; lower the learning rate")


def public_examples(parts: DataParts) -> Examples:
    """Return the public images that are left to train on.

    Raises:
        ConfigError: There are none.
    """
    if not len(parts.public):
        raise ConfigError(["data.num-public: no public image is left to train on; raise it, or lower data.num-validation"])
    return parts.public


def synthetic_examples(config: RunConfig, parts: DataParts, *, num_images: int, purpose: str) -> Examples:
    """Generate images for the server's own use, through the cache in `state-dir`: of each class as many, but for the remainder."""
    labels = [i % parts.info.num_classes for i in range(num_images)]
    seeds = [derive(config.seed, purpose, i) for i in range(num_images)]
    cache = ImageCache(Path(config.state_dir).expanduser() / "cache")
    made = generate_cached(shared_generator(config), cache, labels, seeds)
    return Examples(images=made.images, labels=torch.tensor(labels), synthetic=torch.ones(num_images, dtype=torch.bool))


def warm_start_model(config: RunConfig) -> Classifier:
    """Train the initial model on images that are nobody's, the generator's or the public ones (an option of ours, for every method)."""
    parts, warm = load_parts(config.data), config.warm_start
    if warm.images == "public":
        examples = public_examples(parts)
    else:
        number = warm.num_images or len(parts.private)
        examples = synthetic_examples(config, parts, num_images=number, purpose="warm-start")
    settings = replace(config.train, learning_rate=warm.learning_rate or config.train.learning_rate)
    return train_centrally(replace(config, train=settings), parts, examples, epochs=warm.epochs, seed=config.seed)


def run_central(config: RunConfig, on: Literal["public", "synthetic"]) -> float:
    """Train without a federation and return the accuracy, 0 .. 1, on the whole test set (or the validation part).

    Takes as many image steps as the federation of `config` does in its rounds: clients in a round x their mean number of images x local
    epochs x rounds. Of synthetic images there are as many as the clients have real ones together.
    """
    torch.set_num_threads(config.num_threads)
    parts = load_parts(config.data)
    if on == "public":
        examples = public_examples(parts)
    else:
        examples = synthetic_examples(config, parts, num_images=len(parts.private), purpose="central")
    trained = rounded_up(config.fraction_train, config.num_clients) / config.num_clients  # share of the clients, in a round
    image_steps = config.num_server_rounds * config.train.epochs * trained * len(parts.private)
    model = train_centrally(config, parts, examples, epochs=max(1, round(image_steps / len(examples))), seed=config.seed)
    return evaluate(model.cpu(), scored_part(config.data, parts)).accuracy
