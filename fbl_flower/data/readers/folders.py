"""Images in folders, one for each class."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from fbl_flower.data.readers.decoding import decode_images
from fbl_flower.data.readers.folder_layout import Layout, directories, entries, find_layout, images_in
from fbl_flower.data.readers.formats import image_suffixes, is_image
from fbl_flower.data.readers.names import name_of, shown
from fbl_flower.data.readers.notes import Notes, is_hidden
from fbl_flower.data.readers.source import ImageFormat, Source, examples
from fbl_flower.errors import DataError

LabelledFiles = list[tuple[Path, int]]


def read_folder(path: Path, wanted: ImageFormat, *, needs_test: bool = False) -> Source:
    """Read `path`/CLASS/IMAGE, or the same below one folder for each split (`train`, `test`).

    The order of classes is `wanted.class_names`, whatever the folder holds of them; only without it are they the sorted names of the
    folder's own directories. Files are taken in the order of their names; hidden ones, and those without an image's ending, are counted.

    Args:
        path: The folder.
        wanted: What the images must be. A packaged data set's directories may have the classes' numbers as names.
        needs_test: Whether a folder without a test split is an error.

    Raises:
        DataError: A directory is not one of the classes, has files and no image, or has images in directories of its own; there are no
            class directories, or no images, in all or in the test split that is there; folders are named after unknown splits; an
            image cannot be decoded.
    """
    notes = Notes()
    layout = find_layout(path, wanted.class_names or (), notes)
    if needs_test and layout.test is None:
        raise DataError(
            f"data.path: {shown(path)} has no test split; expected class directories below {shown(path)}/train and {shown(path)}/test"
        )
    classes = [directories(root) for root in layout.roots]
    if not classes[0]:
        raise DataError(
            f"data.path: {shown(layout.train)} has no class directories; wanted {shown(layout.train)}/CLASS/IMAGE.png, or the same below "
            "train/ and test/"
        )
    names = wanted.class_names or tuple(sorted({name_of(directory) for found in classes for directory in found}))
    wanted = replace(wanted, class_names=names)
    labels = {directory: _label(directory, wanted) for found in classes for directory in found}
    files = [[(file, labels[d]) for d in found for file in _class_images(d, notes)] for found in classes]
    _check_splits(layout, files)
    for root in {path, *layout.roots}:
        loose = [entry for entry in entries(root) if is_hidden(entry) or entry.is_file()]
        notes.pass_over(loose, remark=" outside the class folders")
    return labelled_source(files[0], files[1] if len(files) > 1 else [], wanted, notes)


def labelled_source(train: LabelledFiles, test: LabelledFiles, wanted: ImageFormat, notes: Notes) -> Source:
    """Decode files with their labels."""
    files = [file for file, _ in train + test]
    decoded = decode_images(files, wanted, lambda i: shown(files[i]), notes)
    labels = np.array([label for _, label in train + test], dtype=np.int64)
    n = len(train)
    return Source(
        class_names=wanted.class_names or (),
        train=examples(decoded.pixels[:n], labels[:n]),
        test=examples(decoded.pixels[n:], labels[n:]) if test else None,
        notes=notes.lines(),
        train_keys=decoded.keys[:n],
        test_keys=decoded.keys[n:],
    )


def _label(directory: Path, wanted: ImageFormat) -> int:
    label = wanted.label_of(name_of(directory))
    if label is None:
        names = wanted.class_names or ()
        hint = "give the folder that holds these" if wanted.native else "add it to data.classes or move it"
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise DataError(f"data.path: the directory {shown(directory)} is none of the classes {listed}; {hint}")
    return label


def _class_images(directory: Path, notes: Notes) -> list[Path]:
    """Return the images of one class, and count all other files.

    Raises:
        DataError: There are images further below, or files and not one image.
    """
    if deeper := next((inner for inner in directories(directory) if any(map(is_image, inner.rglob("*")))), None):
        raise DataError(
            f"data.path: images in {shown(deeper)}; wanted those of the class {name_of(directory)} directly in {shown(directory)}"
        )
    images = images_in(directory)
    left = [entry for entry in entries(directory) if not is_image(entry) and (is_hidden(entry) or entry.is_file())]
    visible = [entry for entry in left if not is_hidden(entry)]
    if visible and not images:
        kinds = Counter(entry.suffix.lower() or "without an ending" for entry in visible)
        found = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        raise DataError(
            f"data.path: no images in the class directory {shown(directory)}, whose files are {found}. Expected files that Pillow "
            f"reads ({_some_suffixes()}). Convert these, or remove the directory"
        )
    notes.pass_over(left)
    return images


def _check_splits(layout: Layout, files: list[LabelledFiles]) -> None:
    if not files[0]:
        raise DataError(
            f"data.path: no images in the class directories of {shown(layout.train)}; wanted files that Pillow reads ({_some_suffixes()})"
        )
    if layout.test and not files[1]:
        raise DataError(
            f"data.path: no images in {shown(layout.test)}, the test split of {shown(layout.train)}; wanted {shown(layout.test)}/CLASS/IMAGE.png, "
            "or remove the folder to have a share of the others for testing"
        )


def _some_suffixes() -> str:
    common = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm")
    return " ".join(suffix for suffix in common if suffix in image_suffixes()) + " and more"
