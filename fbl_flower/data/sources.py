"""Where a data set's files are, and which reader reads them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fbl_flower.config import DataConfig
from fbl_flower.data.examples import Examples
from fbl_flower.data.identity import pixel_keys
from fbl_flower.data.info import DATASETS, DataInfo, sized_by_share, spellings
from fbl_flower.data.readers.download import default_path
from fbl_flower.data.readers.folder_layout import directories
from fbl_flower.data.readers.folders import read_folder
from fbl_flower.data.readers.hub import PREFIX, hub_path
from fbl_flower.data.readers.names import disk_path, shown
from fbl_flower.data.readers.originals import has_cifar, has_fashion_mnist, read_cifar, read_fashion_mnist
from fbl_flower.data.readers.packaged import read_digits, read_mnist5k
from fbl_flower.data.readers.parquet import parquet_files, read_parquet
from fbl_flower.data.readers.source import ImageFormat, Source, walk
from fbl_flower.data.readers.tiny_imagenet import read_tiny_imagenet
from fbl_flower.errors import ConfigError, DataError

_PARQUET = "parquet file of {0}, a folder of them"
_FOLDERS = "class directories below train and test"
_WANTED = {
    "cifar10": f"the folder cifar-10-batches-py, a {_PARQUET.format('cifar10')}, or {_FOLDERS}",
    "cifar100": f"the folder cifar-100-python, a {_PARQUET.format('cifar100')}, or {_FOLDERS}",
    "tiny-imagenet": f"the folder tiny-imagenet-200, a {_PARQUET.format('tiny-imagenet')}",
    "eurosat": f"the folder with EuroSAT's ten class directories, a {_PARQUET.format('eurosat')}",
    "fashion-mnist": f"the folder with the four IDX files of Fashion-MNIST, a {_PARQUET.format('fashion-mnist')}, or {_FOLDERS}",
    "folder": "a folder with a directory of images for each class",
    "parquet": "a parquet file with the columns image and label, or a folder of them",
}


def find_source(config: DataConfig) -> Path | None:
    """Return the file or folder of the data set, or None where a package has it.

    Raises:
        DataError: There is nothing at `data.path`, or, where that is empty or on the hub, the data set cannot be downloaded.
    """
    if config.name in ("mnist5k", "digits"):
        return None
    if config.path.startswith(PREFIX):
        return hub_path(config.path)
    path = disk_path(config.path) if config.path else default_path(config.name)
    if not path.exists():
        raise DataError(f"data.path: no file at {shown(path)}; wanted {_WANTED[config.name]}")
    return path


def files_digest(path: str) -> str:
    """Tell the user's own files from others without reading them: a digest of their names below `path` and sizes; for the hub, its name."""
    root = disk_path(path)
    try:
        if path.startswith(PREFIX) or not root.exists():
            return path
    except OSError:  # it may not be looked at: what reads it says so
        return path
    if root.is_file():
        return hashlib.sha256(str(root.stat().st_size).encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for folder, names in walk(root):
        for file in (folder / name for name in sorted(names)):
            if file.is_file():  # a link may lead nowhere
                text = f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\n"
                digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()[:12]


def newest_change(path: Path) -> int:
    """Return a number that changes when files are added, removed, or, directly in `path`, written anew."""
    stamps = [path.stat().st_mtime_ns]
    if path.is_dir():
        stamps += [(entry.stat() if entry.exists() else entry.lstat()).st_mtime_ns for entry in path.iterdir()]
        stamps += [folder.stat().st_mtime_ns for folder, _ in walk(path)]
    return hash(tuple(stamps))


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Keys of the pixels of each image as it was in its file, before channels and size were changed: uint64 [N]."""

    train: np.ndarray
    test: np.ndarray | None


def read_source(config: DataConfig, path: Path | None) -> tuple[DataInfo, Source, Keys]:
    """Read the data set, in the channels asked for.

    Args:
        config: Its name, classes, image size and channels count.
        path: What `find_source` returned.

    Returns:
        What is known of the data set, with default sizes of its parts, its images, and their keys.

    Raises:
        DataError: A file is missing or damaged, or holds a label outside the classes.
    """
    source = _read(config, path, image_format(config))
    keys = _keys_of(source)
    if config.channels:
        source = replace(source, train=_in_channels(source.train, config.channels))
        source = replace(source, test=_in_channels(source.test, config.channels) if source.test else None)
    channels, size = source.train.images.shape[1:3]
    if config.name in DATASETS:
        info = replace(DATASETS[config.name], channels=channels)
    else:
        info = own_info(config.name, source.class_names, channels=channels, image_size=size)
    if config.name in ("mnist5k", "digits", "cifar10", "cifar100", "fashion-mnist"):
        return info, source, keys
    num_test = len(source.test) if source.test else 0
    test_share = 0.1 if config.name == "eurosat" else 0.2
    return sized_by_share(info, num_train=len(source.train), num_test=num_test, test_share=test_share), source, keys


def _keys_of(source: Source) -> Keys:
    train = pixel_keys(source.train.images) if source.train_keys is None else source.train_keys
    if source.test is None:
        return Keys(train=train, test=None)
    return Keys(train=train, test=pixel_keys(source.test.images) if source.test_keys is None else source.test_keys)


def image_format(config: DataConfig) -> ImageFormat:
    """Return what the files of the data set must hold."""
    info, background = DATASETS.get(config.name), config.background_rgb
    if info is not None:
        return ImageFormat(
            name=info.name, class_names=info.class_names, spellings=spellings(info), channels=info.channels, native=info.image_size,
            background=background,
        )  # fmt: skip
    return ImageFormat(
        name=config.name,
        class_names=config.class_names or None,
        channels=config.channels or (3 if config.name == "folder" else 0),
        size=config.image_size,
        upright=True,
        background=background,
    )


def own_info(name: str, class_names: tuple[str, ...], *, channels: int, image_size: int) -> DataInfo:
    """Describe the user's own images. Nothing is known of them: they are not mirrored, and shifted by an eighth at most."""
    return DataInfo(
        name=name, class_names=class_names, channels=channels, image_size=image_size, shift=image_size // 8, flip=False,
        num_test=0, num_public=0, num_validation=0, num_private=0,
    )  # fmt: skip


def _read(config: DataConfig, path: Path | None, wanted: ImageFormat) -> Source:
    if path is None:
        images = read_mnist5k() if config.name == "mnist5k" else read_digits()
        return Source(class_names=wanted.class_names or (), train=images, test=None)
    needs_test = config.name in ("cifar10", "cifar100", "tiny-imagenet", "fashion-mnist")
    if config.name == "parquet" or (config.name != "folder" and (path.is_file() or parquet_files(path))):
        return read_parquet(path, wanted, needs_test=needs_test)
    match config.name:
        case "cifar10" | "cifar100" if has_cifar(path, config.name):
            return read_cifar(path, wanted)
        case "fashion-mnist" if has_fashion_mnist(path):
            return read_fashion_mnist(path, wanted)
        case "tiny-imagenet":
            return read_tiny_imagenet(path, wanted)
        case "eurosat":
            layouts = ("eurosat/2750", "EuroSAT/2750", "2750", "EuroSAT_RGB")  # of torchvision, and of the archives
            inner = next((p for layout in layouts if (p := path / layout).is_dir()), path)
            return read_folder(inner, wanted)
        case "folder":
            return read_folder(path, wanted)
        case "cifar10" | "cifar100" | "fashion-mnist":
            if not directories(path):
                raise DataError(f"data.path: nothing of {config.name} in {shown(path)}; expected {_WANTED[config.name]}")
            return read_folder(path, wanted, needs_test=True)
        case _:
            raise ConfigError([f"data.name: got {config.name!r}; allowed: {' | '.join([*DATASETS, 'folder', 'parquet'])}"])


def _in_channels(examples: Examples, channels: int) -> Examples:
    """Turn images of 1 or 3 channels into grey (ITU-R 601, as Pillow) or into three equal channels."""
    images = examples.images
    if images.shape[1] == channels:
        return examples
    if channels == 3:
        return replace(examples, images=images.expand(-1, 3, -1, -1).contiguous())
    weights = torch.tensor([0.299, 0.587, 0.114])[None, :, None, None]
    pieces = [(piece * weights).sum(1, keepdim=True).round().to(torch.uint8) for piece in images.split(4096)]
    return replace(examples, images=torch.cat(pieces))
