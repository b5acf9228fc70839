"""`fbl-flower generator quality` and `tune`: what generators are worth, and the best steps and guidance of one."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from dataclasses import replace

import torch

from fbl_flower.commands.bench import measure
from fbl_flower.commands.generator import configuration_of, size_of
from fbl_flower.commands.json_file import check_place, write_json
from fbl_flower.commands.overrides import read_overrides
from fbl_flower.config import FEDERATED, RunConfig
from fbl_flower.data.datasets import DataParts, load_parts
from fbl_flower.data.examples import Examples
from fbl_flower.errors import ConfigError, RunFailed
from fbl_flower.generation.loading import generator_folder, load_generator, sampling_of, settled
from fbl_flower.generation.measures import Classifier, TrainClassifier
from fbl_flower.generation.memorising import as_table, measure_memorising
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.generation.quality import Quality, compare, measure_quality
from fbl_flower.generation.recipe import check_recipe_writable, read_info, write_sampling
from fbl_flower.generation.sampling_defaults import Sampling
from fbl_flower.generation.tuning import tune_sampling
from fbl_flower.training.judge import describe_judge, train_judge
from fbl_flower.training.prepare import client_images

_COST_IMAGES = 100  # made in a process of its own, whose memory is measured


def quality(options: argparse.Namespace) -> None:
    """Measure generators; print a table for each, and one that compares them."""
    folders = options.folders or [None]
    configs = [configuration_of(options, folder=folder) for folder in folders]
    check_place(options.out)
    _tell_unused(options)
    parts = load_parts(configs[0].data)
    torch.set_num_threads(options.threads)
    places = [generator_folder(config, parts) for config in configs]
    generators = [load_generator(config, parts) for config in configs]  # all of them, before the first hour of work
    train_classifier = _remembering(configs[0], parts)
    measured: dict[str, Quality] = {}
    for config, place, generator in zip(configs, places, generators, strict=True):
        start = time.perf_counter()
        on_disk = config.generator.name != "public-images"
        # first: it tells what fails before the long work
        peak_mb = _peak_mb(config, parts, options.threads) if on_disk else None
        federated = on_disk and settled(config, parts).generator.name != "text-to-image" and read_info(place).federation
        one = measure_quality(
            generator,
            parts,
            train_classifier=train_classifier,
            seeds=options.seeds,
            evaluate_on=options.evaluate_on,
            trained_on=parts.private if federated else None,
        )
        name = str(place) if on_disk else config.generator.name
        if on_disk:
            one = replace(one, sampling=str(sampling_of(config, parts)), num_bytes=size_of(place), peak_mb=peak_mb)
        measured[name] = one
        print(f"{name}\n\n{one.as_markdown()}\n")
        print(f"The judge is right on {100 * one.judge_accuracy:.1f} % of the real {one.evaluated_on} images.")
        if options.clients:
            print(f"{memorising_of(generator, config, parts, seed=options.seeds[0])}\n")
        print(f"measured in {time.perf_counter() - start:.0f} s\n", flush=True)
        if options.out is not None:
            report = {name: quality.as_json() for name, quality in measured.items()}
            write_json(options.out, {"judge": describe_judge(), "generators": report})
    if len(measured) > 1:
        print(compare(measured))


def memorising_of(generator: ImageGenerator, config: RunConfig, parts: DataParts, *, seed: int) -> str:
    """Return the table of what the generator's images tell of each simulated client's."""
    clients = [client_images(config, client)[1] for client in range(config.num_clients)]
    return as_table(measure_memorising(generator, clients, parts.test, seed=seed))


def tune(options: argparse.Namespace) -> None:
    """Measure steps and guidance on validation images, and write the best into the generator's recipe."""
    config = configuration_of(options, folder=options.folder, found=_tuning_problems(options))
    candidates = [Sampling(steps=steps, guidance=guidance) for steps in options.steps for guidance in options.guidance]
    check_place(options.out)
    _tell_unused(options)
    parts = load_parts(config.data)
    config = settled(config, parts)
    if config.generator.name not in ("diffusion", FEDERATED):
        raise ConfigError([f"generator.name: got {config.generator.name!r}; only diffusion generators have a recipe to tune"])
    torch.set_num_threads(options.threads)
    folder = generator_folder(config, parts)

    def load(sampling: Sampling) -> ImageGenerator:
        chosen = replace(config.generator, steps=sampling.steps, guidance=sampling.guidance)
        return load_generator(replace(config, generator=chosen), parts)

    load(candidates[0])  # what is wrong with the folder is told before the long work
    info = read_info(folder)
    if not options.dry_run:
        check_recipe_writable(folder)
    found = tune_sampling(
        load,
        candidates,
        parts,
        train_classifier=_remembering(config, parts),
        seeds=options.seeds,
        num_images=options.images,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    chosen_on = {"data": parts.info.name, "weights": info.weights, **found.as_json()}
    best = replace(found.chosen.sampling, chosen_on=chosen_on)
    print(
        f"{folder}: {found.num_images} images under {len(found.seeds)} seeds, against {found.num_validation} validation images\n"
    )
    print(found.as_markdown())
    print(
        f"\nThe judge is right on {100 * found.judge_accuracy:.1f} % of the real validation images.\n"
        f"{best}: the fewest evaluations of the network within one standard error ({found.standard_error:.4f}) "
        f"of the highest accuracy ({found.best.accuracy:.3f})"
    )
    if options.out is not None:
        write_json(options.out, {"judge": describe_judge(), "steps": best.steps, "guidance": best.guidance, **chosen_on})
    if options.dry_run:
        print("dry run: nothing was written into the recipe")
    else:
        write_sampling(folder, best, measured=info)
        print(f"written to {folder / 'recipe.json'}")


def _tuning_problems(options: argparse.Namespace) -> list[str]:
    problems = []
    for name, values in (("steps", options.steps), ("guidance", options.guidance)):
        if len(set(values)) < len(values):
            problems.append(f"--{name}: expected each value once, got {', '.join(f'{value:g}' for value in values)}")
        for value in dict.fromkeys(values):
            try:
                Sampling(**{"steps": 1, "guidance": 1.0} | {name: value})
            except ValueError as error:
                problems.append(f"--{error}")
    if options.images < 0:
        problems.append(f"--images: expected a whole number >= 0, got {options.images}")
    asked = read_overrides(options.config)
    problems += [
        f"{key}: the candidates are given with --{key.removeprefix('generator.')}"
        for key in ("generator.steps", "generator.guidance")
        if key in asked
    ]
    return problems


def _tell_unused(options: argparse.Namespace) -> None:
    """Say which settings of -c play no part: the judge has a recipe of its own."""
    if unused := [key for key in read_overrides(options.config) if key.startswith(("model.", "train."))]:
        print(f"fbl-flower: {', '.join(unused)}: not used; the judge has a recipe of its own", file=sys.stderr)


def _peak_mb(config: RunConfig, parts: DataParts, threads: int) -> float | None:
    """Return the largest resident set, in MiB, of a process that does nothing but make images."""
    cost = measure(config, parts, task="generate", number=_COST_IMAGES, threads=threads)
    if cost.problem:
        raise RunFailed(f"quality: {cost.problem}")
    return cost.peak_mb


def _remembering(config: RunConfig, parts: DataParts) -> TrainClassifier:
    """Return what trains the judge's network, once for the same images and seed."""
    known: dict[tuple[str, int], Classifier] = {}

    def train_classifier(examples: Examples, seed: int) -> Classifier:
        digest = hashlib.sha256(examples.images.numpy().tobytes())
        digest.update(examples.labels.numpy().tobytes())
        key = digest.hexdigest(), seed
        if key not in known:
            known[key] = train_judge(config, parts, examples, seed)
        return known[key]

    return train_classifier
