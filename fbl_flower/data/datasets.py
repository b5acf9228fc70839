"""From a data set's name to its disjoint parts: test, public (training and validation), private.

What an image shows decides in which part it is: the same images in another order, or from other files, are cut in the same way in every
run. So a generator trained on the public part of one copy of a data set is safe with any other copy. Equal images are in the same part.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from fbl_flower.config import DataConfig
from fbl_flower.data.batches import antialiased
from fbl_flower.data.examples import Examples
from fbl_flower.data.identity import examples_sha256
from fbl_flower.data.info import DATASETS, DataInfo
from fbl_flower.data.readers.source import Source
from fbl_flower.data.sources import Keys, find_source, newest_change, read_source
from fbl_flower.errors import ConfigError, DataError
from fbl_flower.free_memory import free_bytes, is_out_of_memory

__all__ = ["DATASETS", "DataInfo", "DataParts", "forget_parts", "load_parts", "scored_part"]

_MOST_PIXELS = 2**28  # that are resized together: 1 GiB as floats
_READ = (
    "name",
    "path",
    "classes",
    "background",
    "image_size",
    "channels",
    "num_test",
    "num_public",
    "num_validation",
    "num_private",
)


@dataclass(frozen=True, kw_only=True)
class DataParts:
    """A data set, cut. No image is in two parts.

    Attributes:
        info: The data set; `info.image_size` is the native size, `image_size` the one in use.
        test: The server's test set.
        public: Public images, without validation: they train the generator.
        validation: Public images kept for tuning.
        private: The clients' images, all together.
        notes: What was left out when the images were read, a sentence each.
    """

    info: DataInfo
    image_size: int
    test: Examples
    public: Examples
    validation: Examples
    private: Examples
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def public_sha256(self) -> str:
        """Identify the public training images: a generator trained on others may have seen the test set."""
        return examples_sha256(self.public)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Say what was read, as text for each part: a run is resumed only where all of it is the same."""
        parts = {"test": self.test, "public": self.public, "validation": self.validation, "private": self.private}
        return {"classes": json.dumps(self.info.class_names)} | {
            name: f"{len(part)} images, sha256 {examples_sha256(part)[:16]}" for name, part in parts.items()
        }


def load_parts(config: DataConfig) -> DataParts:
    """Load the data set that `config` names and cut it.

    The result is kept for the next call with the same settings and the same files.

    Raises:
        DataError: A file is missing or damaged, or holds a label outside the classes.
        ConfigError: The parts asked for are larger than the data set.
    """
    asked = DataConfig(**{f.name: getattr(config, f.name) for f in fields(config) if f.name in _READ})
    try:
        path = find_source(config)
        return _load_parts(asked, path, newest_change(path) if path else 0)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            ["data.image-size: the images do not fit into memory; choose smaller ones, or fewer (data.num-private)"]
        ) from error
    except OSError as error:
        place = config.path or error.filename
        raise DataError(
            f"data.path: {place} cannot be read ({error.strerror or error}); correct it, or mend its permissions"
        ) from error


def forget_parts() -> None:
    """Give back the memory of the data sets that `load_parts` has kept."""
    _load_parts.cache_clear()


def scored_part(config: DataConfig, parts: DataParts) -> Examples:
    """Return the images that `data.evaluate-on` asks for: all test images, or the validation part, which no method has seen either.

    Raises:
        ConfigError: There are no validation images.
    """
    if config.evaluate_on == "test":
        return parts.test
    if not len(parts.validation):
        raise ConfigError(
            ["data.evaluate-on: validation, but data.num-validation leaves no image for it; raise data.num-validation"]
        )
    return parts.validation


@functools.lru_cache(maxsize=2)
def _load_parts(config: DataConfig, path: Path | None, stamp: int) -> DataParts:
    info, source, keys = read_source(config, path)
    return _cut(config, info, source, keys)


@dataclass(frozen=True, kw_only=True)
class _Order:
    """Images in the order in which parts take them.

    Attributes:
        index: int64 [N], into the images.
        group: int64 [N], for each entry of `index`; equal images have the same and stand side by side.
    """

    index: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def split(self, number: int) -> tuple[_Order, _Order]:
        """Take `number` images, or a few less where only larger groups of equal images are left; and return the rest."""
        taken = np.zeros(len(self), dtype=bool)
        starts = np.flatnonzero(np.diff(self.group, prepend=-1))
        sizes = np.diff(starts, append=len(self))
        whole = int(np.searchsorted(np.cumsum(sizes), number, side="right"))  # groups that fit one after the other
        left = number - int(sizes[:whole].sum())
        taken[: number - left] = True
        for start, size in zip(starts[whole:], sizes[whole:], strict=True):
            if left == 0:
                break
            if size <= left:
                taken[start : start + size] = True
                left -= size
        return self._where(taken), self._where(~taken)

    def _where(self, mask: np.ndarray) -> _Order:
        return _Order(index=self.index[mask], group=self.group[mask])


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """How many images each part is asked to have."""

    test: int
    public: int
    validation: int
    private: int | None  # None: as the data set has it, or all that are left

    @classmethod
    def of(cls, config: DataConfig, info: DataInfo) -> _Sizes:
        def number(asked: int, default: int) -> int:
            return default if asked < 0 else asked

        public = number(config.num_public, info.num_public)
        return cls(
            test=number(config.num_test, info.num_test),
            public=public,
            validation=number(config.num_validation, min(info.num_validation, public)),
            private=None if config.num_private < 0 else config.num_private,
        )

    @staticmethod
    def keys_set(config: DataConfig) -> str:
        """Return the keys of the sizes that the user has set; of all, where each is the data set's own."""
        sizes = {"num-test": config.num_test, "num-public": config.num_public, "num-private": config.num_private}
        return ", ".join(f"data.{key}" for key, number in sizes.items() if number >= 0) or ", ".join(
            f"data.{key}" for key in sizes
        )


def _cut(config: DataConfig, info: DataInfo, source: Source, keys: Keys) -> DataParts:
    """Take the parts out of the images one after the other: test, public, validation, private."""
    asked, size = _Sizes.of(config, info), config.image_size or info.image_size
    test, order, problems, copies = _test_part(config, source, keys, asked.test)
    notes = (*source.notes, copies) if copies else source.notes
    rest = len(order) - asked.public
    num_private = max(0, min(rest, info.num_private)) if asked.private is None else asked.private
    if asked.validation > asked.public:
        problems.append(
            f"data.num-validation: got {asked.validation}; it is a part of the public images, which are {asked.public}"
        )
    if len(test) == 0:
        problems.append(
            f"data.num-test: got {asked.test}; the server needs at least one test image, and equal images stay in one part"
        )
    if num_private < 1 or num_private > rest:
        num_usable = len(order) + (len(test) if _cuts_test(source, keys) else 0)
        problems.append(
            f"{_Sizes.keys_set(config)}: {asked.test} test, {asked.public} public and {num_private} private images asked for; {config.name} has {num_usable} for "
            "those parts, and at least one must be private" + (f" ({copies})" if copies else "")
        )
    if problems:
        raise ConfigError(problems)
    public, order = order.split(asked.public - asked.validation)
    validation, order = order.split(asked.validation)
    all_that_is_left = asked.private is None and num_private == rest
    private = order if all_that_is_left else order.split(num_private)[0]
    for name, found, wanted in (
        ("test", len(test), asked.test),
        ("public training", len(public), asked.public - asked.validation),
        ("validation", len(validation), asked.validation),
        ("private", len(private), num_private),
    ):
        if found < wanted:
            notes += (
                f"{found} {name} images instead of {wanted}: equal images stay in one part, and the next group is larger",
            )
    if len(private) == 0:
        raise ConfigError([f"data.num-private: no private image is left ({'; '.join(notes)}). Give the clients more images"])

    channels = source.train.images.shape[1]
    _check_memory((test, public, validation, private), channels=channels, size=size)

    def images(part: _Order) -> Examples:
        return _resized(source.train.take(torch.from_numpy(part.index)), size)

    return DataParts(
        info=info,
        image_size=size,
        test=_resized(test, size),
        public=images(public),
        validation=images(validation),
        private=images(private),
        notes=notes,
    )


def _cuts_test(source: Source, keys: Keys) -> bool:
    """Whether the test part has to be taken out of the training images."""
    return source.test is None or keys.test is None


def _test_part(config: DataConfig, source: Source, keys: Keys, num_test: int) -> tuple[Examples, _Order, list[str], str]:
    """Return the test part, the order of the images that are left, what is wrong, and a note on copies that were left out."""
    balanced = config.name in DATASETS
    order = _ordered(source.train.labels.numpy(), keys.train, class_balanced=balanced)
    if source.test is None or keys.test is None:
        taken, order = order.split(num_test)
        return source.train.take(torch.from_numpy(taken.index)), order, [], ""
    problems, note = [], ""
    if num_test > len(source.test):
        problems.append(f"data.num-test: got {num_test}; the test split of {config.name} has {len(source.test)} images")
    copies = np.isin(keys.train, keys.test)[order.index]
    if num_copies := int(copies.sum()):
        order = _Order(index=order.index[~copies], group=order.group[~copies])
        note = f"{num_copies} training images are copies of test images and are left out"
    chosen = _ordered(source.test.labels.numpy(), keys.test, class_balanced=balanced).index[:num_test]
    return source.test.take(torch.from_numpy(chosen)), order, problems, note


def _ordered(labels: np.ndarray, keys: np.ndarray, *, class_balanced: bool) -> _Order:
    """Order images by what they show, so that every stretch of the order has its share of every class.

    Args:
        labels: int64 [N].
        keys: uint64 [N], of the pixels. Equal images count once, under the smallest of their labels.
        class_balanced: Every stretch holds the classes about equally often; else about as often as all of it, a small class too, if it
            has images enough: a stretch of the share s may lack a class of fewer than about 1 / s images.
    """
    unique, first, group = np.unique(keys, return_index=True, return_inverse=True)
    label = labels[first].copy()
    np.minimum.at(label, group, labels)
    rank = np.empty(len(unique), dtype=np.int64)  # in the class, by key, which is as good as a random order
    for one in np.unique(label):
        of_class = np.flatnonzero(label == one)
        rank[of_class] = np.arange(len(of_class))
    share_before = (rank + 0.5) / np.bincount(label)[label]
    position = np.lexsort((label, rank) if class_balanced else (unique, share_before))
    place = np.empty(len(unique), dtype=np.int64)
    place[position] = np.arange(len(unique))
    index = np.lexsort((labels, place[group]))
    return _Order(index=index, group=place[group][index])


def _piece(channels: int, size: int) -> int:
    """Return how many images are resized together: as floats, all of a large data set, or a few huge ones, may not fit."""
    return max(1, min(4096, _MOST_PIXELS // (channels * size**2)))


def _check_memory(parts: Sequence[Examples | _Order], *, channels: int, size: int) -> None:
    """Refuse images that cannot fit into the memory that is free, before they fill it."""
    number = sum(len(part) for part in parts)
    needed, free = number * channels * size**2, free_bytes()
    if free is not None and needed > free:
        text = f"data.image-size: {number} images of {size} x {size} pixels take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; choose smaller ones, or fewer"
        raise ConfigError([text])


def _resized(examples: Examples, size: int) -> Examples:
    if len(examples) == 0:
        return replace(examples, images=examples.images.new_zeros(0, examples.images.shape[1], size, size))
    if examples.images.shape[-1] == size:
        return examples
    pieces = examples.images.split(_piece(examples.images.shape[1], size))
    return replace(examples, images=torch.cat([antialiased(piece, size) for piece in pieces]))
