"""What a text-to-image generator's folder is: five components, and a `recipe.json` of its own kind.

Reading it needs neither the weights nor the diffusion library, so a run can be checked before it starts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.recipe import RECIPE, check_files

KIND = "text-to-image"
_FORMAT = 1
WAY_OUT = "copy it again, or make it anew with `fbl-flower generator quantize`"

# Component: the classes that it may have. Of schedulers there are many; any of diffusers' own will do.
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "scheduler": (),
}
WEIGHTS = ("4bit", "8bit", "none")
DTYPES = ("bf16", "fp32")


@dataclass(frozen=True, kw_only=True)
class PipelineInfo:
    """The contents of `recipe.json`.

    Attributes:
        source: The pipeline that it was made from: a name on the hub, or the last part of a directory's path.
        revision: Commit on the hub; empty for a directory.
        tiny_decoder: The same of the small autoencoder in place of the pipeline's own; empty: its own.
        components: Class of each component.
        dtype: Type of what is not quantised, and of the computation: bf16 or fp32.
        weights: 4bit, 8bit or none, of UNet and text encoder.
        float_layers: Layers of the UNet that stay in float all the same.
        resolution: Height and width in pixels that the model was trained for.
        vae_scale: Pixels per latent position, along a side.
        num_parameters: Of each component that has weights.
        versions: Of the libraries.
        files: SHA-256 of every other file, by its path inside the folder.
    """

    source: str
    revision: str
    tiny_decoder: str
    components: Mapping[str, str]
    dtype: str
    weights: str
    float_layers: tuple[str, ...]
    resolution: int
    vae_scale: int
    num_parameters: Mapping[str, int]
    versions: Mapping[str, str]
    files: Mapping[str, str]


def write_pipeline_info(folder: Path, info: PipelineInfo) -> None:
    """Write `info` as the `recipe.json` of `folder`."""
    text = json.dumps({"kind": KIND, "format": _FORMAT, **dataclasses.asdict(info)}, indent=2)
    (folder / RECIPE).write_text(text + "\n", encoding="utf-8")


def read_pipeline_info(folder: Path) -> PipelineInfo:
    """Read the `recipe.json` of `folder`.

    Raises:
        GeneratorError: The folder is missing or something else, or the file is no JSON or lacks an entry.
    """
    if not folder.is_dir():
        raise GeneratorError(
            f"generator.path: no folder at {folder}; make one with `fbl-flower generator quantize SOURCE {folder}`"
        )
    file = folder / RECIPE
    if not file.is_file():
        if (folder / "model_index.json").is_file():
            raise GeneratorError(
                f"generator.path: {folder} is a pipeline in full precision; clients load a quantised one: "
                f"`fbl-flower generator quantize {folder} DEST`, then give DEST"
            )
        raise GeneratorError(
            f"generator.path: {folder} holds no {RECIPE}; it is no text-to-image generator's folder; {WAY_OUT}"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(raw, dict) and "kind" not in raw and {"training", "federation"} & raw.keys():
            raise GeneratorError(
                f'generator.path: {folder} is a class-conditional generator; set generator.name = "diffusion", or correct the path'
            )
        return _parse(raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise GeneratorError(f"generator: {file} is damaged ({type(error).__name__}: {error}); {WAY_OUT}") from error


def check_pipeline_files(folder: Path, info: PipelineInfo) -> list[str]:
    """Return a sentence for each file that is missing, changed, or does not belong to the folder."""
    problems = check_files(folder, info, way_out=WAY_OUT)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_dir() and name not in info.files and name != RECIPE:
            problems.append(f"generator: {file} is foreign: {RECIPE} does not know it; remove it")
    return problems


def _parse(raw: dict[str, Any]) -> PipelineInfo:
    if raw.pop("kind") != KIND or raw.pop("format") != _FORMAT:
        raise ValueError(f"wanted kind {KIND!r} and format {_FORMAT}")
    info = PipelineInfo(**raw | {"float_layers": tuple(raw["float_layers"])})
    if info.components.keys() != COMPONENTS.keys():
        raise ValueError(f"components: got {', '.join(info.components)}; wanted {', '.join(COMPONENTS)}")
    for name, allowed in COMPONENTS.items():
        if allowed and info.components[name] not in allowed:
            raise ValueError(f"{name}: got the class {info.components[name]!r}; wanted {' or '.join(allowed)}")
    for name, value, allowed in (("weights", info.weights, WEIGHTS), ("dtype", info.dtype, DTYPES)):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}; wanted {' or '.join(allowed)}")
    for name in ("resolution", "vae_scale"):
        if type(getattr(info, name)) is not int or getattr(info, name) < 1:
            raise TypeError(f"{name}: got {getattr(info, name)!r}; wanted a whole number >= 1")
    if not info.files:
        raise ValueError("files: empty")
    for name in info.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"files: got {name!r}; wanted a path inside the folder")
    return info
