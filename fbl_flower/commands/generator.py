"""`fbl-flower generator`: train, quantize, gallery."""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fbl_flower.commands.json_file import check_place, unwritable_file
from fbl_flower.commands.overrides import read_overrides
from fbl_flower.config import FEDERATED, RunConfig, Value, parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.data.examples import Examples
from fbl_flower.device import pick_device
from fbl_flower.errors import ConfigError, GeneratorError
from fbl_flower.federation.local import run_local
from fbl_flower.generation.augment import default_deformation
from fbl_flower.generation.folder import quantize_generator
from fbl_flower.generation.loading import load_generator
from fbl_flower.generation.new_folder import make_parent, new_folder
from fbl_flower.generation.pipeline_store import AUTO, quantize_pipeline
from fbl_flower.generation.recipe import Augmentation, TrainingRecipe, is_trained
from fbl_flower.generation.training import train_generator
from fbl_flower.reporting.pictures import gallery
from fbl_flower.reporting.rundir import RunDirectory
from fbl_flower.seeding import derive

_GALLERY = 8  # images of each class and kind


_OF_PUBLIC_TRAINING = {
    "steps": None, "batch_size": None, "learning_rate": None, "widths": None, "augmentation": None, "compile": False,
    "weights": "4bit", "minutes": math.inf, "checkpoint_every": 100,
}  # fmt: skip


def train_federated(options: argparse.Namespace) -> None:
    """Let the clients of a federation in this process train a generator together, and write its folder; go on where that was stopped."""
    strange = [name for name, default in _OF_PUBLIC_TRAINING.items() if getattr(options, name) != default]
    found = [
        f"--{name.replace('_', '-')}: not together with --federated, whose settings are federated-generator.* (-c)"
        for name in strange
    ]
    config = configuration_of(options, found=found)
    parts = load_parts(config.data)
    out = options.out or Path(f"{parts.info.name}-{parts.image_size}px-federated")
    if out.exists():
        raise GeneratorError(f"generator: {out} is there already; remove it, or choose another folder")
    make_parent(out)
    working = out.with_name(f"{out.name}.training")
    config = replace(
        config,
        generator=replace(config.generator, name=FEDERATED, path=""),
        seed=options.seed,
        num_server_rounds=0,
        num_threads=1,
        checkpoint_every=1,
        output_dir=str(working / "runs"),
        state_dir=str(working / "state"),
        resume="auto",
    )
    run = run_local(config, workers=options.threads).run_dir
    with new_folder(out) as folder:
        for file in RunDirectory(run).generator.iterdir():
            shutil.copyfile(file, folder / file.name)
    shutil.rmtree(working)
    print(f"{out}: {size_of(out) / 1e6:.2f} MB, trained by {config.num_clients} clients; for generator.path")


def train(options: argparse.Namespace) -> None:
    """Train a generator on the public part and write its folder; go on with a training that was stopped."""
    if options.federated:
        train_federated(options)
        return
    config = configuration_of(options)
    if strange := [key for key in read_overrides(options.config) if not key.startswith("data.") and key != "device"]:
        raise ConfigError(
            [f"{', '.join(strange)}: a training takes only data.* and device from -c; its own options are listed by --help"]
        )
    parts = load_parts(config.data)
    torch.set_num_threads(options.threads)
    asked = {name: getattr(options, name) for name in ("steps", "batch_size", "learning_rate", "widths", "seed")}
    deformed = default_deformation(parts.info) if options.augmentation is None else options.augmentation
    recipe = TrainingRecipe(
        **{name: value for name, value in asked.items() if value is not None}, augmentation=Augmentation().scaled(deformed)
    )
    out = options.out or Path(f"{parts.info.name}-{parts.image_size}px")
    if options.checkpoint_every < 1 or not options.minutes > 0:
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


def draw_gallery(options: argparse.Namespace) -> None:
    """Draw validation images beside synthetic ones."""
    config = configuration_of(options, folder=options.folder)
    parts = load_parts(config.data)
    torch.set_num_threads(options.threads)
    check_place(options.out, make_folder=True)
    names = parts.info.class_names
    labels = [label for label in range(len(names)) for _ in range(_GALLERY)]
    seeds = [derive(config.seed, "gallery", place) for place in range(len(labels))]
    images = load_generator(config, parts).generate(labels, seeds)
    synthetic = Examples(images=images, labels=torch.tensor(labels), synthetic=torch.ones(len(labels), dtype=torch.bool))
    try:
        gallery(parts.validation, synthetic, names, options.out, per_class=_GALLERY)
    except OSError as error:
        raise unwritable_file(options.out, error) from error
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
        print(f"{options.dest}: {size_of(options.dest.expanduser()) / 1e6:.2f} MB; {source} has {size_of(source) / 1e6:.2f} MB")
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
    num, size = sum(info.num_parameters.values()), size_of(options.dest.expanduser())
    print(
        f"{options.dest}: {num / 1e6:.1f} M weights in {size / 1e6:.1f} MB, {size / (4 * num):.2f} of their size in 32 bits; "
        f"images of {info.resolution} pixels; made in {time.perf_counter() - start:.0f} s"
    )


def size_of(folder: Path) -> int:
    """Return the bytes of all files in `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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
