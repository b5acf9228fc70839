"""Data sets as their authors distribute them: IDX files (Fashion-MNIST), and the Python batches of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import gzip
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fbl_flower.data.examples import Examples, concatenate
from fbl_flower.data.readers.source import ImageFormat, Source, check_labels, examples
from fbl_flower.errors import DataError

CIFAR_FOLDER = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_CIFAR_FILES = {
    "cifar10": (tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)),
    "cifar100": (("train",), ("test",)),
}
_HARMLESS = {  # what a pickled array consists of, under numpy's old and new names
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def has_cifar(path: Path, name: str) -> bool:
    """Tell whether a folder, or the one in it, holds any of CIFAR's batches."""
    return (path / CIFAR_FOLDER[name]).is_dir() or any(
        (path / file).is_file() for files in _CIFAR_FILES[name] for file in files
    )


def has_fashion_mnist(path: Path) -> bool:
    """Tell whether a folder, or torchvision's inside it, holds any of the IDX files."""
    return any(_idx_folder(path).glob("*-ubyte*"))


def read_cifar(path: Path, wanted: ImageFormat) -> Source:
    """Read the batches of CIFAR-10, or CIFAR-100 with its fine labels, from their folder or the one that holds it.

    Raises:
        DataError: A file is missing or damaged.
    """
    inner = path / CIFAR_FOLDER[wanted.name]
    root = inner if inner.is_dir() else path
    train, test = ([_read_batch(root / name, wanted) for name in names] for names in _CIFAR_FILES[wanted.name])
    return Source(class_names=wanted.class_names or (), train=concatenate(*train), test=concatenate(*test))


def read_fashion_mnist(path: Path, wanted: ImageFormat) -> Source:
    """Read four IDX files, packed (.gz) or not, from their folder; torchvision's own folder above it will do.

    Raises:
        DataError: A file is missing or damaged.
    """
    root = _idx_folder(path)
    parts = []
    for kind in ("train", "t10k"):
        image_file, label_file = (
            _packed_or_not(root / f"{kind}-{name}") for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        images, labels = read_idx(image_file), read_idx(label_file)
        if images.shape[1:] != (wanted.native, wanted.native) or labels.shape != images.shape[:1]:
            raise DataError(
                f"data.path: {image_file} holds {images.shape} and {label_file.name} {labels.shape}; "
                f"wanted [N, {wanted.native}, {wanted.native}] and [N]"
            )
        check_labels(labels, len(wanted.class_names or ()), where=label_file, name=wanted.name)
        parts.append(examples(images[:, None], labels))
    return Source(class_names=wanted.class_names or (), train=parts[0], test=parts[1])


def _idx_folder(path: Path) -> Path:
    return next((p for p in (path / "FashionMNIST" / "raw", path / "raw") if p.is_dir()), path)


def read_idx(file: Path) -> np.ndarray:
    """Read an IDX file of bytes: 0, 0, 8 (unsigned byte), number of axes, each axis as 32 bits big-endian, then the values."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data.path: {file} cannot be read ({error}); get it anew") from error
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = (
        tuple(int(n) for n in np.frombuffer(content, dtype=">u4", count=axes, offset=4)) if len(content) >= 4 + 4 * axes else ()
    )
    start = 4 + 4 * axes
    if not axes or len(content) - start != int(np.prod(shape, dtype=np.int64)) or not shape:
        raise DataError(f"data.path: {file} is not a whole IDX file of bytes: {len(content)} bytes, axes {shape}; get it anew")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, numbers, texts and containers, and calls nothing else: a pickle from somewhere may hold any program."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return super().find_class(module, name)


def _read_batch(file: Path, wanted: ImageFormat) -> Examples:
    try:
        with file.open("rb") as stream:
            batch = _ArraysOnly(stream, encoding="bytes").load()
        pixels = batch[b"data"].reshape(-1, 3, 32, 32)
        labels = np.array(batch[b"fine_labels" if wanted.name == "cifar100" else b"labels"], dtype=np.int64)
        if pixels.dtype != np.uint8 or labels.shape != (len(pixels),):
            raise ValueError(f"{pixels.dtype} {pixels.shape} with labels {labels.shape}")
    except FileNotFoundError as error:
        raise DataError(
            f"data.path: no file at {file}; wanted parquet files, or the folder {CIFAR_FOLDER[wanted.name]} of {wanted.name}"
        ) from error
    except (pickle.UnpicklingError, OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"data.path: {file} is not a whole batch of {wanted.name}: {error}; get it anew") from error
    check_labels(labels, len(wanted.class_names or ()), where=file, name=wanted.name)
    return examples(pixels, labels)


def _packed_or_not(file: Path) -> Path:
    packed = file.with_name(file.name + ".gz")
    if not packed.is_file() and not file.is_file():
        raise DataError(f"data.path: no file at {packed}; wanted the four IDX files of Fashion-MNIST")
    return packed if packed.is_file() else file
