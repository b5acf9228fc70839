"""The folder tiny-imagenet-200, as distributed or with its validation images sorted into class folders."""

from __future__ import annotations

from pathlib import Path

from fbl_flower.data.readers.folder_layout import directories, images_in
from fbl_flower.data.readers.folders import LabelledFiles, labelled_source
from fbl_flower.data.readers.names import shown
from fbl_flower.data.readers.notes import Notes
from fbl_flower.data.readers.source import ImageFormat, Source
from fbl_flower.data.readers.tiny_imagenet_names import TINY_IMAGENET
from fbl_flower.errors import DataError

_LABEL = {wnid: label for label, wnid in enumerate(TINY_IMAGENET)}


def read_tiny_imagenet(path: Path, wanted: ImageFormat) -> Source:
    """Read train/WNID/images/*.JPEG, and as the test split val/images with val/val_annotations.txt, or val/WNID of the same form as train.

    Images may also lie directly in the folder of their WordNet id.

    Raises:
        DataError: A file or a class is missing or unknown, or an image cannot be decoded.
    """
    root = path / "tiny-imagenet-200" if (path / "tiny-imagenet-200").is_dir() else path
    train, val = root / "train", root / "val"
    train_files = _by_class(train)
    in_order = (val / "images").is_dir() and bool(images_in(val / "images"))
    sorted_val = val.is_dir() and not in_order and any(d.name in _LABEL for d in directories(val))
    test_files = _by_class(val, ignore="images") if sorted_val else _annotated(val)
    for split, files in ((train, train_files), (val, test_files)):
        if not files:
            raise DataError(f"data.path: no images in {shown(split)}; wanted the folder tiny-imagenet-200 as distributed")
    return labelled_source(train_files, test_files, wanted, Notes())


def _by_class(split: Path, *, ignore: str = "") -> LabelledFiles:
    files: LabelledFiles = []
    for directory in directories(split):
        if directory.name == ignore:
            continue
        if directory.name not in _LABEL:
            raise DataError(f"data.path: the directory {shown(directory)} is none of Tiny-ImageNet's 200 classes (WordNet ids)")
        inner = directory / "images" if (directory / "images").is_dir() else directory
        files += [(file, _LABEL[directory.name]) for file in images_in(inner)]
    return files


def _annotated(val: Path) -> LabelledFiles:
    annotations = val / "val_annotations.txt"
    if not annotations.is_file():
        raise DataError(
            f"data.path: no file at {shown(annotations)}, and no folders val/WNID; wanted the folder tiny-imagenet-200 as distributed, or with "
            "val sorted into class folders"
        )
    files: LabelledFiles = []
    for line, row in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        fields = row.split("\t")
        if len(fields) < 2 or fields[1] not in _LABEL:
            raise DataError(
                f"data.path: {shown(annotations)}, line {line}: got {row!r}; wanted a file and one of the 200 WordNet ids"
            )
        files.append((val / "images" / fields[0], _LABEL[fields[1]]))
    return files
