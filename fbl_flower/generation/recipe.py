"""What a generator folder is: its files, and `recipe.json`, which says how they came to be.

Reading it needs neither the network nor the diffusion library, so a run can be checked before it starts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.sampling_defaults import Sampling, parse_sampling
from fbl_flower.whole_file import part_of, replacing

RECIPE = "recipe.json"
NETWORK = "config.json"  # the constructor arguments of diffusers' UNet2DModel
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Ranges of the random deformation that a training image gets; every range is drawn uniformly in -x .. x.

    Attributes:
        rotation: Degrees.
        scale: Change of size, as a share; each axis has half of it on its own.
        shear: Horizontal shift per unit of height.
        shift: Share of the image's side.
        elastic: Displacement of a smooth random field, as a share of the image's side.
    """

    rotation: float = 12.0
    scale: float = 0.15
    shear: float = 0.2
    shift: float = 0.05
    elastic: float = 0.03

    def scaled(self, factor: float) -> Augmentation:
        """Return the ranges times `factor`, >= 0.

        Raises:
            GeneratorError: `factor` is negative.
        """
        if not factor >= 0:
            raise GeneratorError(f"augmentation of a generator's training: got {factor}; wanted >= 0")
        return Augmentation(**{name: factor * value for name, value in dataclasses.asdict(self).items()})


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """The hyper-parameters of a generator. With the same data, seed and machine they give the same weights.

    Attributes:
        widths: Channels of the UNet at each resolution; multiples of 32, or 4-bit groups become coarse.
        steps: Optimiser steps; few, because the public part is small and a long training memorises it.
        batch_size: Images per step.
        learning_rate: Peak of AdamW's step size, after `warmup` steps; then a cosine to a twentieth.
        label_dropout: Share of the images trained without their label, for classifier-free guidance.
        ema: Largest decay of the moving average of the weights; the average is what is kept.
        augmentation: Random deformations, against memorising.
        seed: Decides the first weights and every draw.
    """

    widths: tuple[int, ...] = (64, 96)
    steps: int = 1300
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    label_dropout: float = 0.1
    ema: float = 0.999
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.widths or any(width < 32 or width % 32 for width in self.widths):
            problems.append(f"widths: got {self.widths}; wanted multiples of 32")
        if self.steps < 1 or self.batch_size < 1 or self.warmup < 0:
            problems.append(f"steps, batch_size, warmup: got {self.steps}, {self.batch_size}, {self.warmup}; wanted >= 1, 1, 0")
        if not 0 <= self.label_dropout < 1 or not 0 <= self.ema < 1:
            problems.append(f"label_dropout, ema: got {self.label_dropout}, {self.ema}; wanted 0 <= x < 1")
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate: got {self.learning_rate}; wanted a number > 0")
        if problems:
            raise GeneratorError("recipe of a generator: " + "; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Who trained a federated generator, and how.

    Attributes:
        identity: `federated.federation_identity` of the images.
        num_clients: Clients that took part in a round.
        seed: The run's.
        settings: `federated-generator.*`.
    """

    identity: str
    num_clients: int
    seed: int
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class GeneratorInfo:
    """The contents of `recipe.json`.

    Attributes:
        data_name: Data set of the images that trained it.
        image_size: Height and width of its images, in pixels.
        channels: 1 (grey) or 3 (RGB).
        class_names: In the order of the labels.
        public_sha256: `DataParts.public_sha256` of the training images; empty for a federated one.
        num_images: How many they were; 0: not told.
        training: The hyper-parameters; None for a federated one.
        federation: Who trained it, if clients did, on images of their own.
        wall_seconds, cpu_seconds, num_threads: What the steps of the training took, without checkpoints and previews.
        versions: Of the libraries.
        device, compiled: Where it ran ("cpu, cuda" if in pieces on both), and whether torch compiled the network in any piece; both
            round differently.
        weights: 4bit, 8bit or none (32-bit floats).
        sampling: The steps and the guidance to use where the settings say 0; None: a default.
        files: SHA-256 of every other file of the folder, by name.
    """

    data_name: str
    image_size: int
    channels: int
    class_names: tuple[str, ...]
    public_sha256: str
    num_images: int
    training: TrainingRecipe | None = None
    federation: Federation | None = None
    wall_seconds: float
    cpu_seconds: float
    num_threads: int
    versions: Mapping[str, str]
    device: str = "cpu"
    compiled: bool = False
    weights: str = "4bit"
    sampling: Sampling | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def write_info(folder: Path, info: GeneratorInfo) -> None:
    """Write `info` as the `recipe.json` of `folder`."""
    (folder / RECIPE).write_text(_as_json(info), encoding="utf-8")


def write_sampling(folder: Path, sampling: Sampling, *, measured: GeneratorInfo) -> None:
    """Replace the entry `sampling` in the `recipe.json` of `folder`, atomically.

    Args:
        folder: A generator's folder.
        sampling: What was chosen.
        measured: The recipe of the generator that was measured to choose it.

    Raises:
        GeneratorError: The folder now has another generator, or the file cannot be written.
    """
    info = read_info(folder)
    if info.files != measured.files:
        raise GeneratorError(f"generator: {folder} has changed since it was measured. Measure it again.")
    file = (folder / RECIPE).resolve()
    try:
        with replacing(file, sync=True) as part:
            part.write_text(_as_json(dataclasses.replace(info, sampling=sampling)), encoding="utf-8")
            part.chmod(file.stat().st_mode)
    except OSError as error:
        raise _unwritable(file, error) from error


def check_recipe_writable(folder: Path) -> None:
    """Raise `GeneratorError` if `write_sampling` could not write; for before a long measurement."""
    part = part_of((folder / RECIPE).resolve())
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise _unwritable(folder / RECIPE, error) from error


def _unwritable(file: Path, error: OSError) -> GeneratorError:
    """Return the error of a `recipe.json` that cannot be written."""
    return GeneratorError(
        f"generator: cannot write {file} ({error.strerror or error}). "
        "Check its permissions and the free space, or use a copy of the folder."
    )


def _as_json(info: GeneratorInfo) -> str:
    entries = dataclasses.asdict(info)
    for name in ("training", "federation", "sampling"):
        if entries[name] is None:
            del entries[name]
    return json.dumps({"format": _FORMAT, **entries}, indent=2, allow_nan=False) + "\n"


def is_trained(folder: Path) -> bool:
    """Return whether `folder` looks like one of a generator that was trained here, and no pipeline."""
    return all((folder / name).is_file() for name in (RECIPE, NETWORK))


def read_info(folder: Path) -> GeneratorInfo:
    """Read the `recipe.json` of `folder`.

    Raises:
        GeneratorError: The folder or the file is missing, is no JSON, or lacks an entry.
    """
    if not folder.is_dir():
        raise GeneratorError(
            f"generator: no folder at {folder}; wanted one with {RECIPE}; train one, or correct generator.path "
            "(on a node with a generator-path of its own: that)"
        )
    file = folder / RECIPE
    if not file.is_file():
        raise GeneratorError(f"generator: {folder} holds no {RECIPE}; it is not a generator's folder; correct generator.path")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or "kind" not in raw:
            sampling = _sampling_of(raw, file)
            return dataclasses.replace(_parse(raw), sampling=sampling)
    except _WrongSampling:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, GeneratorError) as error:
        raise GeneratorError(
            f"generator: {file} is damaged ({type(error).__name__}: {error}); copy or train the generator again"
        ) from error
    raise GeneratorError(
        f"generator.path: {folder} is of the kind {raw['kind']}; set generator.name, or correct generator.path"
    )


class _WrongSampling(GeneratorError):
    """The entry `sampling` of a recipe is wrong; the rest of the generator may be fine."""


def _sampling_of(raw: dict[str, Any], file: Path) -> Sampling | None:
    """Take the entry `sampling` out of a recipe; recipes of earlier versions have none."""
    try:
        return parse_sampling(raw.pop("sampling", None))
    except ValueError as error:
        raise _WrongSampling(
            f"generator: {file}: sampling: {error}. Correct the entry, or delete it and run `fbl-flower generator tune`."
        ) from error


class HasFiles(Protocol):
    """The contents of any kind of `recipe.json`."""

    @property
    def files(self) -> Mapping[str, str]: ...


def check_files(folder: Path, info: HasFiles, *, way_out: str = "copy or train the generator again") -> list[str]:
    """Compare every file with the sum in `info`; return a sentence for each that is missing or changed."""
    problems = []
    for name, wanted in info.files.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"generator: {file} is missing; {way_out}")
        elif (got := file_sha256(file)) != wanted:
            problems.append(
                f"generator: {file} is damaged: its sha256 is {got[:12]}..., {RECIPE} says {wanted[:12]}...; {way_out}"
            )
    return problems


def file_sha256(file: Path) -> str:
    """Return the hex SHA-256 of a file; a process reads it once, as long as its size and time of change stay."""
    now = file.stat()
    return _sha256(file, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@functools.lru_cache(maxsize=256)
def _sha256(file: Path, *_state: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _parse(raw: dict[str, Any]) -> GeneratorInfo:
    if raw.pop("format") != _FORMAT:
        raise ValueError(f"wanted format {_FORMAT}")
    made: dict[str, Any]
    if "federation" in raw:
        made = {"federation": Federation(**raw["federation"])}
    else:
        training = dict(raw["training"])
        training["augmentation"] = Augmentation(**training["augmentation"])
        training["widths"] = tuple(training["widths"])
        made = {"training": TrainingRecipe(**training)}
    names = tuple(str(name) for name in raw["class_names"])
    info = GeneratorInfo(**raw | made | {"class_names": names})
    for name in ("image_size", "channels", "num_images", "num_threads"):
        if not isinstance(getattr(info, name), int):
            raise TypeError(f"{name}: got {getattr(info, name)!r}; wanted a whole number")
    if not isinstance(info.files, dict) or not info.files:
        raise ValueError(f"files: got {info.files!r}; wanted the sum of each file")
    return info
