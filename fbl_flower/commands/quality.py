"""`fbl-flower generator quality`: what generators are worth, as tables."""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
import time
from dataclasses import asdict, replace

import torch

from fbl_flower.commands.bench import measure
from fbl_flower.commands.generator import configuration_of, size_of
from fbl_flower.commands.json_file import check_place, write_json
from fbl_flower.config import RunConfig
from fbl_flower.data.batches import to_float
from fbl_flower.data.datasets import DataParts, load_parts
from fbl_flower.data.examples import Examples
from fbl_flower.errors import ConfigError, RunFailed
from fbl_flower.generation.loading import generator_folder, load_generator
from fbl_flower.generation.quality import Classifier, Quality, compare, measure_quality
from fbl_flower.models import check_model
from fbl_flower.training.central import train_centrally

_BATCH = 250  # images that a measuring classifier sees at once
_NO_JUDGE = 0.1  # of the way from chance to no error: a judge below that has not learned
_COST_IMAGES = 100  # made in a process of its own, whose memory is measured


def quality(options: argparse.Namespace) -> None:
    """Measure generators; print a table for each, and one that compares them."""
    folders = options.folders or [None]
    configs = [configuration_of(options, folder=folder) for folder in folders]
    check_place(options.out)
    if options.epochs < 1:
        raise ConfigError([f"--epochs: got {options.epochs}; allowed: whole number >= 1"])
    parts = load_parts(configs[0].data)
    check_model(configs[0].model, image_size=parts.image_size)
    torch.set_num_threads(options.threads)
    places = [generator_folder(config, parts) for config in configs]
    generators = [load_generator(config, parts) for config in configs]  # all of them, before the first hour of work
    train_classifier = functools.partial(_train_classifier, configs[0], parts, options.epochs, {})
    measured: dict[str, Quality] = {}
    for config, place, generator in zip(configs, places, generators, strict=True):
        start = time.perf_counter()
        on_disk = config.generator.name != "public-images"
        peak_mb = (
            _peak_mb(config, parts, options.threads) if on_disk else None
        )  # first: it tells what fails before the long work
        one = measure_quality(
            generator, parts, train_classifier=train_classifier, seeds=options.seeds, evaluate_on=options.evaluate_on
        )
        name = str(place) if on_disk else config.generator.name
        measured[name] = one = replace(one, num_bytes=size_of(place) if on_disk else None, peak_mb=peak_mb)
        print(f"{name}\n\n{one.as_markdown()}\n\nmeasured in {time.perf_counter() - start:.0f} s\n", flush=True)
        chance = 1 / parts.info.num_classes
        if one.judge_accuracy < chance + _NO_JUDGE * (1 - chance):
            print(
                f"fbl-flower: the network that judges gives only {100 * one.judge_accuracy:.0f} % of the real images their label: nothing here "
                "can be relied on; train longer (--epochs), or choose another (such as -c 'model.stem=\"32x32\"' for small images)",
                file=sys.stderr,
            )
        if options.out is not None:
            report = {name: asdict(quality) for name, quality in measured.items()}
            write_json(options.out, {"epochs": options.epochs, "generators": report})
    if len(measured) > 1:
        print(compare(measured))


def _peak_mb(config: RunConfig, parts: DataParts, threads: int) -> float | None:
    """Return the largest resident set, in MiB, of a process that does nothing but make images."""
    cost = measure(config, parts, task="generate", number=_COST_IMAGES, threads=threads)
    if cost.problem:
        raise RunFailed(f"quality: {cost.problem}")
    return cost.peak_mb


def _train_classifier(
    config: RunConfig, parts: DataParts, epochs: int, known: dict[tuple[str, int], Classifier], examples: Examples, seed: int
) -> Classifier:
    """Train the run's network, as `TrainClassifier` wants; `known` holds those trained before, by their images and seed."""
    digest = hashlib.sha256(examples.images.numpy().tobytes())
    digest.update(examples.labels.numpy().tobytes())
    key = digest.hexdigest(), seed
    if key in known:
        return known[key]
    model = train_centrally(config, parts, examples, epochs=epochs, seed=seed).eval()
    device = next(model.parameters()).device

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        batches = torch.split(images, _BATCH)
        return torch.cat([model.features(to_float(batch.to(device))).float().cpu() for batch in batches])

    @torch.no_grad()
    def predict(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.head(features(images).to(device))
        return logits.cpu()

    known[key] = Classifier(predict=predict, features=features)
    return known[key]
