"""`fbl-flower generator`: train, quantize, quality, gallery."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fbl_flower.commands.overrides import read_overrides
from fbl_flower.config import RunConfig, Value, parse_config
from fbl_flower.data.batches import to_float
from fbl_flower.data.datasets import DataParts, load_parts
from fbl_flower.data.examples import Examples
from fbl_flower.data.info import DataInfo
from fbl_flower.device import pick_device
from fbl_flower.errors import ConfigError
from fbl_flower.generation.folder import quantize_generator
from fbl_flower.generation.loading import generator_folder, load_generator
from fbl_flower.generation.pipeline_store import AUTO, quantize_pipeline
from fbl_flower.generation.quality import Classifier, Quality, compare, measure_quality
from fbl_flower.generation.recipe import Augmentation, TrainingRecipe, is_trained
from fbl_flower.generation.training import train_generator
from fbl_flower.reporting.pictures import gallery
from fbl_flower.seeding import derive
from fbl_flower.training.central import train_centrally

_GALLERY = 8  # images of each class and kind
_BATCH = 250  # images that a measuring classifier sees at once


def train(options: argparse.Namespace) -> None:
    """Train a generator on the public part and write its folder; go on with a training that was stopped."""
    config = configuration_of(options)
    parts = load_parts(config.data)
    torch.set_num_threads(options.threads)
    asked = {name: getattr(options, name) for name in ("steps", "batch_size", "learning_rate", "widths", "seed")}
    deformed = default_deformation(parts.info) if options.augmentation is None else options.augmentation
    recipe = TrainingRecipe(
        **{name: value for name, value in asked.items() if value is not None}, augmentation=Augmentation().scaled(deformed)
    )
    out = options.out or Path(f"{parts.info.name}-{parts.image_size}px")
    if options.checkpoint_every < 1 or options.minutes <= 0:
        problem = f"--checkpoint-every, --minutes: got {options.checkpoint_every}, {options.minutes:g}; allowed: >= 1, > 0"
        raise ConfigError([problem])
    device = pick_device(config)
    print(f"training on the {len(parts.public)} public images of {parts.info.name}, on {device.type}", flush=True)
    info = train_generator(
        parts,
        recipe=recipe,
        out=out,
        weights=options.weights,
        device=device.type,
        compiled=options.compile,
        checkpoint_every=options.checkpoint_every,
        stop_after=60 * options.minutes,
        progress=lambda line: print(line, flush=True),
    )
    if info is None:
        return
    print(f"{out}: trained in {info.wall_seconds:.0f} s ({info.cpu_seconds:.0f} s of processor time)")


def default_deformation(info: DataInfo) -> float:
    """Return by how much the ranges of the augmentation are multiplied: images that may be mirrored are photographs, which bend oddly."""
    return 0.0 if info.flip else 1.0


def quality(options: argparse.Namespace) -> None:
    """Measure generators; print a table for each, and one that compares them."""
    folders = options.folders or [None]
    configs = [configuration_of(options, folder=folder) for folder in folders]
    check_parent(options.out)
    if options.epochs < 1:
        raise ConfigError([f"--epochs: got {options.epochs}; allowed: whole number >= 1"])
    parts = load_parts(configs[0].data)
    torch.set_num_threads(options.threads)
    places = [generator_folder(config, parts) for config in configs]
    generators = [load_generator(config, parts) for config in configs]  # all of them, before the first hour of work
    train_classifier = functools.partial(_train_classifier, configs[0], parts, options.epochs, {})
    measured: dict[str, Quality] = {}
    for config, place, generator in zip(configs, places, generators, strict=True):
        start = time.perf_counter()
        measured[str(place)] = one = measure_quality(
            generator,
            parts,
            train_classifier=train_classifier,
            seeds=options.seeds,
            evaluate_on=options.evaluate_on,
            num_bytes=_size(place) if config.generator.name != "public-images" else None,
        )
        print(f"{place}\n\n{one.as_markdown()}\n\nmeasured in {time.perf_counter() - start:.0f} s\n", flush=True)
        if options.out is not None:
            report = {name: dataclasses.asdict(quality) for name, quality in measured.items()}
            part = options.out.with_name(options.out.name + ".part")
            part.write_text(json.dumps({"epochs": options.epochs, "generators": report}, indent=2) + "\n", encoding="utf-8")
            os.replace(part, options.out)
    if len(measured) > 1:
        print(compare(measured))


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


def draw_gallery(options: argparse.Namespace) -> None:
    """Draw validation images beside synthetic ones."""
    config = configuration_of(options, folder=options.folder)
    parts = load_parts(config.data)
    torch.set_num_threads(options.threads)
    names = parts.info.class_names
    labels = [label for label in range(len(names)) for _ in range(_GALLERY)]
    seeds = [derive(config.seed, "gallery", place) for place in range(len(labels))]
    images = load_generator(config, parts).generate(labels, seeds)
    synthetic = Examples(images=images, labels=torch.tensor(labels), synthetic=torch.ones(len(labels), dtype=torch.bool))
    gallery(parts.validation, synthetic, names, options.out, per_class=_GALLERY)
    print(f"{options.out}: real validation images on the left, synthetic ones on the right")


def quantize(options: argparse.Namespace) -> None:
    """Make a generator's folder from a pipeline, or from a generator trained here, in full precision."""
    if options.threads < 1:
        raise ConfigError([f"--threads: got {options.threads}; allowed: whole number >= 1"])
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    source = Path(options.source).expanduser()
    if is_trained(source):
        if options.tiny_decoder != AUTO or options.full_decoder or options.revision or options.dtype:
            raise ConfigError(
                [
                    "--tiny-decoder, --full-decoder, --revision, --dtype: only for pipelines; the source is a generator trained here"
                ]
            )
        quantize_generator(source, options.dest.expanduser(), weights=options.weights)
        print(f"{options.dest}: {_size(options.dest.expanduser()) / 1e6:.2f} MB; {source} has {_size(source) / 1e6:.2f} MB")
        return
    info = quantize_pipeline(
        options.source,
        options.dest,
        weights=options.weights,
        tiny_decoder="" if options.full_decoder else options.tiny_decoder,
        revision=options.revision,
        dtype=options.dtype or "bf16",
        progress=lambda line: print(line, flush=True),
    )
    num, size = sum(info.num_parameters.values()), _size(options.dest.expanduser())
    print(
        f"{options.dest}: {num / 1e6:.1f} M weights in {size / 1e6:.1f} MB, {size / (4 * num):.2f} of their size in 32 bits; "
        f"images of {info.resolution} pixels; made in {time.perf_counter() - start:.0f} s"
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_parent(out: Path | None) -> None:
    """Refuse a file to write, before any work, if the folder that it is to lie in is not there."""
    if out is not None and not out.parent.is_dir():
        raise ConfigError([f"--out: no folder at {out.parent} for {out.name}; make it, or choose another"])


def configuration_of(options: argparse.Namespace, *, folder: Path | None = None, found: Sequence[str] = ()) -> RunConfig:
    """Put the options of a command on generators into a configuration; `found` are problems to report together with its own."""
    # How many of the images are the clients' does not matter here: the public part is cut first.
    settings: dict[str, Value] = {"data.name": options.data, "data.num-private": -1} | read_overrides(options.config)
    if options.data_path is not None:
        settings["data.path"] = options.data_path
    if options.image_size is not None:
        settings["data.image-size"] = options.image_size
    if folder is not None:
        settings["generator.path"] = str(folder)
    threads = [] if options.threads >= 1 else [f"--threads: got {options.threads}; allowed: whole number >= 1"]
    return parse_config(settings, found=[*found, *threads])
