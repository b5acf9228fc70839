"""From a data set's name to its disjoint parts: test, public (training and validation), private."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from fbl_flower.config import DataConfig
from fbl_flower.data.batches import antialiased
from fbl_flower.data.examples import Examples
from fbl_flower.data.info import DATASETS, DataInfo
from fbl_flower.data.sources import find_source, newest_change, read_source
from fbl_flower.errors import ConfigError, DataError
from fbl_flower.seeding import numpy_stream

__all__ = ["DATASETS", "DataInfo", "DataParts", "forget_parts", "load_parts", "scored_part"]

_SPLIT_SEED = 0  # the cut into parts is the same in every run: a generator trained on one's public part is safe in another
_READ = ("name", "path", "classes", "image_size", "channels", "num_test", "num_public", "num_validation", "num_private")


@dataclass(frozen=True, kw_only=True)
class DataParts:
    """A data set, cut. No image is in two parts.

    Attributes:
        info: The data set; `info.image_size` is the native size, `image_size` the one in use.
        test: The server's test set.
        public: Public images, without validation: they train the generator.
        validation: Public images kept for tuning.
        private: The clients' images, all together.
    """

    info: DataInfo
    image_size: int
    test: Examples
    public: Examples
    validation: Examples
    private: Examples

    @property
    def public_sha256(self) -> str:
        """Identify the public training images: a generator trained on others may have seen the test set."""
        digest = hashlib.sha256()
        for tensor in (self.public.images, self.public.labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


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
    info, source = read_source(config, path)
    return _cut(config, info, source.train, source.test)


def _cut(config: DataConfig, info: DataInfo, pool: Examples, test: Examples | None) -> DataParts:
    size = config.image_size or info.image_size
    pool = _resized(pool, size)
    test = _resized(test, size) if test else None

    def number(asked: int, default: int) -> int:
        return default if asked < 0 else asked

    num_test = number(config.num_test, info.num_test)
    num_public = number(config.num_public, info.num_public)
    num_validation = number(config.num_validation, min(info.num_validation, num_public))
    in_order = _class_balanced_order if config.name in DATASETS else _proportional_order
    order = in_order(pool.labels.numpy())
    problems = []
    if test is None:
        test = pool.take(order[:num_test])
        order = order[num_test:]
    else:
        if num_test > len(test):
            problems.append(f"data.num-test: got {num_test}; the test split of {config.name} has {len(test)} images")
        test = test.take(in_order(test.labels.numpy())[:num_test])
    rest = len(order) - num_public
    num_private = number(config.num_private, max(0, min(rest, info.num_private)))
    if num_validation > num_public:
        problems.append(f"data.num-validation: got {num_validation}; it is a part of the public images, which are {num_public}")
    if len(test) == 0:
        problems.append(f"data.num-test: got {num_test}; the server needs at least one test image")
    if num_private < 1 or num_private > rest:
        problems.append(
            f"data: {num_test} test, {num_public} public and {num_private} private images asked for; "
            f"{config.name} has {len(pool)} for those parts, and at least one must be private"
        )
    if problems:
        raise ConfigError(problems)
    public = order[: num_public - num_validation]
    validation = order[num_public - num_validation : num_public]
    return DataParts(
        info=info,
        image_size=size,
        test=test,
        public=pool.take(public),
        validation=pool.take(validation),
        private=pool.take(order[num_public : num_public + num_private]),
    )


def _class_balanced_order(labels: np.ndarray) -> torch.Tensor:
    """Shuffle so that every stretch of the order holds the classes about equally often."""
    return torch.from_numpy(np.lexsort((labels, _rank_in_class(labels))))


def _proportional_order(labels: np.ndarray) -> torch.Tensor:
    """Shuffle so that every stretch of the order holds the classes about as often as all of it, a small class too, if it has images enough.

    A stretch of the share s may lack a class of fewer than about 1 / s images. Of classes of the same size, chance says which comes first.
    """
    place = (_rank_in_class(labels) + 0.5) / np.bincount(labels)[labels]
    ties = numpy_stream(_SPLIT_SEED, "split", "ties").permutation(len(labels))
    return torch.from_numpy(np.lexsort((ties, place)))


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """Number each class's images, 0, 1, ..., in a random order."""
    shuffled = numpy_stream(_SPLIT_SEED, "split").permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = shuffled[labels[shuffled] == label]
        rank[of_class] = np.arange(len(of_class))
    return rank


def _resized(examples: Examples, size: int) -> Examples:
    if examples.images.shape[-1] == size:
        return examples
    pieces = examples.images.split(4096)  # as floats, a large data set may not fit
    return replace(examples, images=torch.cat([antialiased(piece, size) for piece in pieces]))
