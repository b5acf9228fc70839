"""What the tests of the generation share: small data and a generator that is barely trained."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fbl_flower.config import DataConfig, RunConfig
from fbl_flower.data.datasets import DataInfo, DataParts, load_parts
from fbl_flower.data.examples import Examples
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.loading import check_generator, load_generator
from fbl_flower.generation.recipe import TrainingRecipe
from fbl_flower.generation.training import train_generator

DIGITS = DataConfig(name="digits", num_private=-1)
TINY = TrainingRecipe(widths=(32,), steps=2, batch_size=8, warmup=0)

# Mounts the installed libraries read-only, for one command, in a namespace of its own.
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && ! touch "$0/x" 2> /dev/null && exec "$@"'


def read_only_install() -> list[str]:
    """Return the beginning of a command for which the libraries lie on a read-only disk."""
    prefix = ["unshare", "--mount", "sh", "-c", READ_ONLY, sys.prefix]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs Linux and the right to do it")
    return prefix


class Poison:
    """Stands for images that nobody may look at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of forbidden images was read")

    def __len__(self) -> int:
        raise AssertionError("forbidden images were counted")


def digits() -> DataParts:
    return load_parts(DIGITS)


def tiny_generator(folder: Path) -> Path:
    """Train for two steps on the 8 x 8 digits; the images are noise, everything else is real."""
    train_generator(digits(), recipe=TINY, out=folder / "tiny")
    return folder / "tiny"


def two_class_parts(*, size: int = 4) -> DataParts:
    """Class 0 is black, class 1 is white; every part but the public one is poison."""
    images = torch.cat([torch.zeros(6, 1, size, size), torch.full((6, 1, size, size), 255)]).to(torch.uint8)
    info = DataInfo(
        name="two", class_names=("black", "white"), channels=1, image_size=size, shift=0, flip=False,
        num_test=1, num_public=12, num_validation=0, num_private=1,
    )  # fmt: skip
    public = Examples.real(images, torch.tensor([0] * 6 + [1] * 6))
    poison = cast(Examples, Poison())
    return DataParts(info=info, image_size=size, test=poison, public=public, validation=poison, private=poison)


def refused(config: RunConfig, parts: DataParts, *messages: str) -> None:
    """Both ways to check a generator find the same problems, and every message is among them."""
    problems = "\n".join(check_generator(config, parts))
    with pytest.raises(GeneratorError) as caught:
        load_generator(config, parts)
    assert str(caught.value) == problems
    for message in messages:
        assert message in problems
