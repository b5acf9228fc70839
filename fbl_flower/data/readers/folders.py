"""Images in folders: one for each class, and the layout of tiny-imagenet-200."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fbl_flower.data.readers.decoding import decode_images
from fbl_flower.data.readers.source import ImageFormat, Source, class_name, examples
from fbl_flower.data.readers.tiny_imagenet_names import TINY_IMAGENET
from fbl_flower.errors import DataError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_NO_CLASSES = frozenset({"__MACOSX", "@eaDir"})  # what unpacking on macOS and network storage leave
_TEST = ("test", "validation", "valid", "val")  # the first of them that is there is the test split


def read_folder(path: Path, wanted: ImageFormat) -> Source:
    """Read `path`/CLASS/IMAGE, or the same below `path`/train and `path`/test (unless train is a class, with images directly in it).

    The order of classes is `wanted.class_names`, whatever the folder holds of them; only without it are they the sorted names of the
    folder's own directories. Files are taken in the order of their names; hidden ones, and those without an image's suffix, are not read.

    Raises:
        DataError: A directory is not one of the classes, or has images in directories of its own; there are no class directories, or no
            images, in all or in the test split that is there; an image cannot be decoded.
    """
    directories = _directories(path)
    split = {directory.name: directory for directory in directories}
    is_class = "train" in split and "train" in (wanted.class_names or ()) and _images(split["train"])
    if "train" in split and split.keys() <= {"train", *_TEST} and not is_class:
        held_out = next((split[name] for name in _TEST if name in split), None)
        roots = [split["train"]] + ([held_out] if held_out else [])
    else:
        roots = [path]
    classes = [_directories(root) for root in roots]
    if not classes[0]:
        raise DataError(
            f"data.path: {roots[0]} has no class directories; wanted {roots[0]}/CLASS/IMAGE.png, or the same below train/ and test/"
        )
    names = wanted.class_names or tuple(sorted({class_name(directory.name) for found in classes for directory in found}))
    wanted = replace(wanted, class_names=names)
    number = {name: label for label, name in enumerate(names)}
    for directory in (directory for found in classes for directory in found):
        if class_name(directory.name) not in number:
            way_out = "give the folder that holds these" if wanted.native else "add it to data.classes or move it"
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise DataError(f"data.path: the directory {directory} is none of the classes {shown}; {way_out}")
    for directory in (directory for found in classes for directory in found):
        if deeper := next((inner for inner in _directories(directory) if any(map(_is_image, inner.rglob("*")))), None):
            raise DataError(
                f"data.path: images in {deeper}; wanted those of the class {directory.name} directly in {directory}"
            )
    files = [[(file, number[class_name(d.name)]) for d in found for file in _images(d)] for found in classes]
    if not files[0]:
        raise DataError(
            f"data.path: no images in the class directories of {roots[0]}; wanted files {' '.join(sorted(_SUFFIXES))}"
        )
    if len(files) > 1 and not files[1]:
        raise DataError(
            f"data.path: no images in {roots[1]}, the test split of {roots[0]}; wanted {roots[1]}/CLASS/IMAGE.png, or remove the folder to "
            "have a share of the others for testing"
        )
    return _source(files[0], files[1] if len(files) > 1 else [], wanted)


def read_tiny_imagenet(path: Path, wanted: ImageFormat) -> Source:
    """Read the folder tiny-imagenet-200: train/WNID/images/*.JPEG, and val/images with val/val_annotations.txt as the test split.

    Raises:
        DataError: A file or a class is missing or unknown, or an image cannot be decoded.
    """
    root = path / "tiny-imagenet-200" if (path / "tiny-imagenet-200").is_dir() else path
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise DataError(
            f"data.path: no file at {annotations}; wanted the folder tiny-imagenet-200 as it is distributed, or parquet files"
        )
    number = {wnid: label for label, wnid in enumerate(TINY_IMAGENET)}
    train = []
    for directory in _directories(root / "train"):
        if directory.name not in number:
            raise DataError(f"data.path: the directory {directory} is none of Tiny-ImageNet's 200 classes (WordNet ids)")
        train += [(file, number[directory.name]) for file in _images(directory / "images")]
    test = []
    for line, row in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        fields = row.split("\t")
        if len(fields) < 2 or fields[1] not in number:
            raise DataError(f"data.path: {annotations}, line {line}: got {row!r}; wanted a file and one of the 200 WordNet ids")
        test.append((root / "val" / "images" / fields[0], number[fields[1]]))
    if not train or not test:
        raise DataError(
            f"data.path: no images in {root / ('val' if train else 'train')}; wanted the folder tiny-imagenet-200 as distributed"
        )
    return _source(train, test, wanted)


def _source(train: list[tuple[Path, int]], test: list[tuple[Path, int]], wanted: ImageFormat) -> Source:
    files = [file for file, _ in train + test]
    pixels = decode_images(files, wanted, lambda i: str(files[i]))
    labels = np.array([label for _, label in train + test], dtype=np.int64)
    n = len(train)
    return Source(
        class_names=wanted.class_names or (),
        train=examples(pixels[:n], labels[:n]),
        test=examples(pixels[n:], labels[n:]) if test else None,
    )


def _directories(path: Path) -> list[Path]:
    return [d for d in _entries(path) if d.is_dir() and not d.name.startswith(".") and d.name not in _NO_CLASSES]


def _images(directory: Path) -> list[Path]:
    return [file for file in _entries(directory) if _is_image(file)]


def _entries(path: Path) -> list[Path]:
    """Return what is in a folder, in the order of the names."""
    if not path.is_dir():
        raise DataError(f"data.path: no folder at {path}; wanted a folder of images")
    try:
        return sorted(path.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"data.path: {path} cannot be read ({error.strerror or error}); mend its permissions") from error


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
