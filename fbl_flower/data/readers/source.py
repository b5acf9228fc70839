"""What a reader is asked for, and what it returns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fbl_flower.data.examples import Examples
from fbl_flower.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """What the images of a data set must be, or be made into.

    Attributes:
        name: The data set, for messages.
        class_names: In the order of the labels; None: to be found in the data.
        channels: 1, 3, or 0 for 1 if every image is grey and 3 otherwise.
        spellings: Labels by further spellings of a packaged data set's classes, as `plain` writes them.
        native: Height and width that every image must have, in pixels; 0: any. Only packaged data sets have one.
        size: Where `native` is 0, height and width to scale and crop to; 0: all images must be square and of one size.
        upright: Turn photographs as their EXIF data says.
        background: Red, green and blue of the ground that transparent images are laid over.
    """

    name: str
    class_names: tuple[str, ...] | None
    channels: int
    native: int = 0
    size: int = 0
    upright: bool = False
    background: tuple[int, int, int] = (255, 255, 255)
    spellings: Mapping[str, int] = field(default_factory=dict)

    def label_of(self, name: str) -> int | None:
        """Return the label of a class name in form NFC; None: it is none of the classes.

        A packaged data set's classes may be spelled otherwise, or be their numbers.
        """
        if not self.native:
            return self.class_names.index(name) if self.class_names and name in self.class_names else None
        if name.isascii() and name.isdecimal():
            return int(name) if int(name) < len(self.class_names or ()) else None
        return self.spellings.get(plain(name))


def plain(name: str) -> str:
    """Return the letters and digits of a name in lower case: `T-shirt/top` and `t_shirt_top` are one class."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set in memory, before it is cut.

    Attributes:
        class_names: In the order of the labels.
        train: What test (where `test` is None), public, validation and private parts are cut from.
        test: Its own test split; None where it has none.
        notes: What was passed over or decided, a sentence each.
        train_keys, test_keys: uint64 [N], keys of the pixels as they were before the reader changed them; None where it did not.
    """

    class_names: tuple[str, ...]
    train: Examples
    test: Examples | None
    notes: tuple[str, ...] = ()
    train_keys: np.ndarray | None = None
    test_keys: np.ndarray | None = None


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder below `root`, in order, with the names of its files; links to folders are followed, and a folder comes once."""
    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        inner.sort()
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above it
            inner.clear()
            continue
        seen.add(real)
        yield Path(folder), names


def examples(images: np.ndarray, labels: np.ndarray) -> Examples:
    """Wrap uint8 [N, C, H, W] and whole numbers [N] as real images."""
    return Examples.real(
        torch.from_numpy(np.require(images, requirements=["C", "W"])), torch.from_numpy(labels.astype(np.int64))
    )


def check_labels(labels: np.ndarray, num_classes: int, *, where: object, name: str) -> None:
    """Raise a DataError that names the file where there is no label, or one outside 0 .. num_classes - 1."""
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
        got = f"labels {labels.min()} to {labels.max()}" if len(labels) else "no rows"
        raise DataError(f"data.path: {where} has {got}; {name} has the labels 0 to {num_classes - 1}")
