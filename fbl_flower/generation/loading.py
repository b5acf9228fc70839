"""From the configuration to a generator, and every way in which the two may not fit."""

from __future__ import annotations

import importlib.resources
import json
import math
from dataclasses import replace
from pathlib import Path

from fbl_flower.config import AUTO, FEDERATED, OWN_IMAGES, RunConfig
from fbl_flower.data.datasets import DataParts
from fbl_flower.device import pick_device
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.federated import federated_network, federation_identity
from fbl_flower.generation.prompts import make_prompts
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.generation.public import PublicImages
from fbl_flower.generation.recipe import RECIPE, check_files, read_info
from fbl_flower.generation.sampling_defaults import Sampling, resolve_sampling
from fbl_flower.generation.text_to_image_recipe import check_pipeline_files, read_pipeline_info


def bundled_generator(data_name: str, image_size: int) -> Path:
    """Return the folder where the package has its generator for a data set, whether there is one or not.

    Args:
        data_name: The data set whose public images trained it.
        image_size: Height and width of its images, in pixels.
    """
    try:
        package = importlib.resources.files("fbl_generators")
    except ModuleNotFoundError as error:
        raise GeneratorError(
            "generator.path: empty, and the package fbl_generators, which comes with fbl-flower, is not installed; "
            "run `pip install .` in the checkout, or give the folder of a generator"
        ) from error
    return Path(str(package)) / f"{data_name}-{image_size}px"


def generator_folder(config: RunConfig, parts: DataParts) -> Path:
    """Return the folder that `config` asks for: its own path, or the bundled one for these images."""
    if config.generator.path:
        return Path(config.generator.path).expanduser()
    return bundled_generator(_trained_on(config), parts.image_size)


def choose_generator(config: RunConfig, parts: DataParts) -> tuple[str, str]:
    """Settle `generator.name`, where it is "auto": the generator of `generator.path`; else the bundled one, if it fits; else a federated one.

    Args:
        config: The run's.
        parts: The images that it must fit.

    Returns:
        The name, and why, in a few words.
    """
    chosen = config.generator
    if chosen.name != AUTO:
        return chosen.name, "generator.name says so"
    if chosen.path:
        return kind_of(Path(chosen.path).expanduser()), "it is what generator.path names"
    bundled = replace(config, generator=replace(chosen, name="diffusion"))
    if problems := check_generator(bundled, parts):
        return FEDERATED, "none that comes with the package fits: " + "; ".join(problems)
    return "diffusion", f"{generator_folder(bundled, parts).name} comes with the package and fits"


def settled(config: RunConfig, parts: DataParts) -> RunConfig:
    """Return the configuration with `generator.name` settled, as `choose_generator` does."""
    if config.generator.name != AUTO:
        return config
    return replace(config, generator=replace(config.generator, name=choose_generator(config, parts)[0]))


def kind_of(folder: Path) -> str:
    """Return the `generator.name` of a folder; "diffusion" where it cannot be told: the checks of that kind say what is wrong."""
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        return "text-to-image" if "kind" in recipe else FEDERATED if "federation" in recipe else "diffusion"
    except (OSError, ValueError, TypeError):
        return "diffusion"


def check_generator(config: RunConfig, parts: DataParts) -> list[str]:
    """Say what keeps `load_generator` from working, one sentence for each problem; cheap, and loads no network.

    Args:
        config: Its `generator` and `data.name`.
        parts: The images that the generator must fit.
    """
    try:
        return _problems(settled(config, parts), parts)
    except OSError as error:
        return [_unreadable(config, error)]


def _problems(config: RunConfig, parts: DataParts) -> list[str]:
    if config.generator.name == OWN_IMAGES:
        return [f"generator.name: {OWN_IMAGES!r} repeats a client's own images and makes none. Choose another generator."]
    if config.generator.name == "public-images":
        counts = parts.public.counts(parts.info.num_classes).tolist()
        lacking = [name for name, count in zip(parts.info.class_names, counts, strict=True) if not count]
        return [f"public-images: no public image of {', '.join(lacking)}; use more (data.num-public)"] if lacking else []
    if config.generator.name == "text-to-image":
        return _check_text_to_image(config, parts)
    if config.generator.name == FEDERATED and not config.generator.path:  # still to be trained
        try:
            federated_network(parts.info, parts.image_size)
        except GeneratorError as error:
            return [str(error)]
        return []
    try:
        folder = generator_folder(config, parts)
    except GeneratorError as error:
        return [str(error)]
    if not config.generator.path and not folder.is_dir():
        names = sorted(path.name for path in folder.parent.iterdir() if (path / RECIPE).is_file())
        problem = (
            f"generator.path: empty, and no generator comes with the package for {folder.name} (it has {', '.join(names) or 'none'}); "
            'train one and give its folder, or set generator.name = "public-images"'
        )
        return [problem]
    try:
        info = read_info(folder)
    except GeneratorError as error:
        return [str(error)]
    problems = check_files(folder, info)
    wanted, size = _trained_on(config), parts.image_size
    if info.data_name != wanted:
        problems.append(
            f"generator.trained-on: {folder} was trained on {info.data_name}; wanted {wanted}; "
            "correct generator.path, or name the other data set in generator.trained-on"
        )
    if (info.channels, info.image_size) != (parts.info.channels, size):
        problems.append(
            f"generator.path: {folder} makes images of {info.channels} x {info.image_size} x {info.image_size} (channels, height, "
            f"width); the data set has {parts.info.channels} x {size} x {size}; correct data.image-size, or train one for this size"
        )
    if info.num_classes != parts.info.num_classes:
        problems.append(
            f"generator.path: {folder} knows {info.num_classes} classes; the data set has {parts.info.num_classes}; train one for it"
        )
    elif info.data_name == wanted == config.data.name and info.class_names != parts.info.class_names:
        problems.append(
            f"generator.path: {folder} was trained on the classes {', '.join(info.class_names)}, in this order; the federation's are "
            f"{', '.join(parts.info.class_names)}; correct data.classes, or train one for them"
        )
    elif info.federation is not None:
        # On a node with images of its own, nothing is there to compare with: the server has checked it.
        if len(parts.test) and info.federation.identity != federation_identity(config.data, parts):
            problems.append(
                f"generator.path: {folder} was trained by a federation with other images, or another cut of them, and may have seen test "
                "images; let this one train its own (no generator.path), or restore data.* and the files"
            )
    elif config.generator.name == FEDERATED:
        problems.append(f"generator.path: {folder} was not trained by a federation; set generator.name = 'diffusion'")
    elif wanted == info.data_name == parts.info.name and info.public_sha256 != parts.public_sha256:
        problems.append(
            f"generator.path: {folder} was trained on another public part of {wanted} than this configuration cuts, and may have seen "
            "test images; set data.num-test, data.num-public and data.num-validation to what it was trained with, give the copy of the data set "
            "that it was trained on (data.path), or train one anew"
        )
    return problems


def check_generator_files(config: RunConfig) -> list[str]:
    """Say what is wrong with the folder of `generator.path` itself: all that can be told where the data set cannot be read."""
    chosen = config.generator
    if not chosen.path or chosen.name in ("public-images", OWN_IMAGES):
        return []
    folder = Path(chosen.path).expanduser()
    try:
        if chosen.name == "text-to-image":
            return check_pipeline_files(folder, read_pipeline_info(folder))
        return check_files(folder, read_info(folder))
    except GeneratorError as error:
        return [str(error)]
    except OSError as error:
        return [_unreadable(config, error)]


def _unreadable(config: RunConfig, error: OSError) -> str:
    place = config.generator.path or error.filename
    return f"generator.path: {place} cannot be read ({error.strerror or error}); correct it, or mend its permissions"


def load_generator(config: RunConfig, parts: DataParts) -> ImageGenerator:
    """Load the generator that `config` asks for.

    Args:
        config: Its `generator`, whose name may be "auto", and `data.name`.
        parts: The images that the generator must fit.

    Raises:
        GeneratorError: Everything that `check_generator` finds, or weights that do not fit their network.
    """
    config = settled(config, parts)
    if problems := check_generator(config, parts):
        raise GeneratorError("\n".join(problems))
    chosen = config.generator
    if chosen.name == FEDERATED and not chosen.path:
        raise GeneratorError(
            "generator.name: a federated generator is there once the clients have trained it; "
            "give its folder in generator.path, or another generator"
        )
    if chosen.name == "public-images":
        return PublicImages(parts, batch_size=chosen.batch_size, blur=chosen.blur, noise=chosen.noise)
    folder, sampling = generator_folder(config, parts), sampling_of(config, parts)
    if chosen.name == "text-to-image":
        from fbl_flower.generation.text_to_image import Target, TextToImageGenerator

        prompts = make_prompts(parts.info.name, parts.info.class_names, chosen.prompt, chosen.class_words)
        target = Target(prompts=prompts, image_size=parts.image_size, channels=parts.info.channels)
        chosen = replace(chosen, steps=sampling.steps, guidance=sampling.guidance)
        return TextToImageGenerator.load(folder, chosen, target, device=pick_device(config).type)
    from fbl_flower.generation.diffusion import DiffusionGenerator

    return DiffusionGenerator.load(
        folder,
        steps=sampling.steps,
        guidance=sampling.guidance,
        batch_size=chosen.batch_size,
        memory_limit=chosen.memory_limit,
        device=pick_device(config).type,
    )


def sampling_of(config: RunConfig, parts: DataParts) -> Sampling:
    """Return the steps and the guidance that the generator of `config` uses; only for those that denoise.

    Raises:
        GeneratorError: The folder of a diffusion generator is missing or its `recipe.json` is damaged.
    """
    config = settled(config, parts)
    own = read_info(generator_folder(config, parts)).sampling if config.generator.name in ("diffusion", FEDERATED) else None
    return resolve_sampling(config.generator, own)


def _check_text_to_image(config: RunConfig, parts: DataParts) -> list[str]:
    chosen, problems = config.generator, []
    try:
        make_prompts(parts.info.name, parts.info.class_names, chosen.prompt, chosen.class_words)
    except GeneratorError as error:
        problems.append(str(error))
    if not chosen.path:
        return [*problems, "generator.path: empty; text-to-image needs the directory that `fbl-flower generator quantize` made"]
    folder = generator_folder(config, parts)
    try:
        info = read_pipeline_info(folder)
    except GeneratorError as error:
        return [*problems, str(error)]
    problems += check_pipeline_files(folder, info)
    resolution = chosen.resolution or info.resolution
    if resolution % 8 or resolution % info.vae_scale:
        problems.append(
            f"generator.resolution: got {resolution}; the model of {folder} needs a multiple of {math.lcm(8, info.vae_scale)}"
        )
    if resolution < parts.image_size:
        problems.append(
            f"generator.resolution: images of {resolution} pixels are smaller than the data set's {parts.image_size}; "
            "raise it, or lower data.image-size"
        )
    return problems


def _trained_on(config: RunConfig) -> str:
    return config.generator.trained_on or config.data.name
