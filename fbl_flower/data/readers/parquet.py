"""Parquet files with encoded images: one file with a column split, or files as the Hugging Face hub stores them.

Columns: image (or img), as bytes or as a struct with bytes; label (or fine_label, labels), as whole numbers or as names, or the only ones
that the Hugging Face metadata calls an image and a class label; and split,
without which a word in the name of a file or of its folders tells (`train-00000-of-00002.parquet`, `digits-test.parquet`, `split=test/0.parquet`);
all else is training data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from fbl_flower.data.readers.decoding import decode_images
from fbl_flower.data.readers.source import ImageFormat, Source, check_labels, class_name, examples, walk
from fbl_flower.errors import DataError

_IMAGE, _LABEL = ("image", "img"), ("label", "fine_label", "labels")
_MOST_CLASSES = 10_000  # a larger label is no class, but something else in the column
_TEST = ("test", "validation", "valid", "val", "dev")  # the first of them that is there is the test split
_SPLIT_WORDS = {name: name for name in ("train", *_TEST)} | {"training": "train", "testing": "test"}


def read_parquet(path: Path, wanted: ImageFormat, *, needs_test: bool) -> Source:
    """Read the file, or all `*.parquet` below the folder.

    A split is called train, test or validation; validation is the test split where there is no other, and is left out
    beside one, as is every other split.

    Args:
        path: A file or a folder.
        wanted: Without class names, those of the Hugging Face metadata are taken, else "class 0", "class 1", ...
        needs_test: Whether a data set without a test split is an error.

    Raises:
        DataError: There are several configurations; a file is damaged, lacks a column, or holds a label outside the classes or an image that cannot be decoded.
    """
    files = parquet_files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data.path: no file *.parquet in {path}; wanted the parquet files of {wanted.name}")
    if path.is_dir() and len(kinds := configurations(file.relative_to(path) for file in files)) > 1:
        raise DataError(
            f"data.path: {path} has several configurations: {', '.join(kinds)}; the training images of one may be the test images of another: "
            f"choose one, such as {path / kinds[0]}, or, if they are parts of one data set, put their files into one folder"
        )
    tables = [
        _Table(
            file,
            split=_named_split(file.relative_to(path) if path.is_dir() else Path(file.name)),
            needs_split=needs_test and len(files) == 1,
        )
        for file in files
    ]
    names = wanted.class_names or next((t.class_names for t in tables if t.class_names), None) or _numbered(tables)
    # A packaged data set's names are ours, and its files may spell them otherwise: there the number counts.
    labels = [table.numbers(names, wanted.name, rename=not wanted.native) for table in tables]
    splits = {str(name) for table in tables for name in table.split}
    test = next((name for name in _TEST if name in splits), None)
    for needed in ("train", *(["test"] if needs_test and test is None else [])):
        if needed not in splits:
            raise DataError(f"data.path: {path} has no rows with split {needed!r}; wanted train and test")
    rows = [(t, i) for t in tables for i in range(len(t.split))]
    pixels = decode_images(
        chain.from_iterable(t.blobs() for t in tables), wanted, lambda i: f"{rows[i][0].file}, row {rows[i][1]}"
    )
    split, label = np.concatenate([t.split for t in tables]), np.concatenate(labels)
    train, held_out = split == "train", split == test
    return Source(
        class_names=names,
        train=examples(pixels[train], label[train]),
        test=examples(pixels[held_out], label[held_out]) if test else None,
    )


def parquet_files(folder: Path) -> list[Path]:
    """Return all `*.parquet` below a folder, in order, but for hidden ones."""
    found = [below / name for below, names in walk(folder) for name in names if name.endswith(".parquet")]
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def configurations(files: Iterable[PurePath]) -> list[str]:
    """Return the outermost folders that are named after no split: in each of them the hub keeps a configuration of the data set.

    Args:
        files: Relative to the data set's folder.
    """
    return sorted({file.parts[0] for file in files if len(file.parts) > 1 and not split_words(file.parts[0])})


class _Table:
    """One file: its labels and splits; images are taken out when they are decoded."""

    def __init__(self, file: Path, *, split: str, needs_split: bool) -> None:
        import pyarrow
        import pyarrow.parquet

        self.file = file
        try:
            schema = pyarrow.parquet.read_schema(file)
            features = _hugging_face_features(schema.metadata)
            image = _column(schema.names, _IMAGE, "Image", features)
            label = _column(schema.names, _LABEL, "ClassLabel", features)
            wanted = [image, label, *(["split"] if needs_split or "split" in schema.names else [])]
            if missing := [name for name in wanted if name not in schema.names]:
                raise DataError(
                    f"data.path: {file} has the columns {_listed(tuple(schema.names))}, and none called {' or '.join(missing)}; "
                    "rename yours: image, label and, if one file has several parts, split"
                )
            table = pyarrow.parquet.ParquetFile(file).read(columns=wanted)
            columns = {name: table[name] for name in wanted}
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise DataError(f"data.path: {file} is not a whole parquet file: {error}") from error
        labels = columns[label]
        if pyarrow.types.is_dictionary(labels.type):  # as pandas writes categories
            labels = labels.cast(labels.type.value_type)
        self._image, kind = columns[image], labels.type
        self.labels_are_text = str(kind) in ("string", "large_string", "string_view")
        if not (self.labels_are_text or pyarrow.types.is_integer(kind)) or labels.null_count:
            got = f"{kind} with {labels.null_count} empty rows"
            raise DataError(f"data.path: {file}, column {label}: got {got}; wanted a whole number or a name in every row")
        try:
            self.raw_labels = np.array(labels.to_pylist(), dtype=object if self.labels_are_text else np.int64)
        except OverflowError as error:
            raise DataError(f"data.path: {file}, column {label}: has a number above 2^63, which is no class") from error
        names = features.get(label, {}).get("names")
        self.class_names = tuple(class_name(str(name)) for name in names) if isinstance(names, list) and names else None
        of_rows = columns["split"].to_pylist() if "split" in columns else [split] * len(self.raw_labels)
        self.split = np.array(of_rows, dtype=object)

    def numbers(self, names: tuple[str, ...], data_name: str, *, rename: bool) -> np.ndarray:
        """Return the labels as int64 [N] in the order of `names`."""
        if self.labels_are_text or (rename and self.class_names and self.class_names != names):
            own = self.class_names
            if own and not self.labels_are_text and len(self.raw_labels):
                check_labels(self.raw_labels, len(own), where=self.file, name=data_name)
            text = [own[label] if own and not self.labels_are_text else class_name(label) for label in self.raw_labels]
            number = {name: label for label, name in enumerate(names)}
            if unknown := sorted(set(text) - number.keys()):
                raise DataError(f"data.path: {self.file} has the label {unknown[0]!r}; the classes are {_listed(names)}")
            return np.array([number[name] for name in text], dtype=np.int64)
        if len(self.raw_labels):
            check_labels(self.raw_labels, len(names), where=self.file, name=data_name)
        return self.raw_labels.astype(np.int64)

    def blobs(self) -> Any:
        """Yield each row's encoded image; None where there is none."""
        import pyarrow

        for chunk in self._image.chunks:
            if pyarrow.types.is_struct(chunk.type):
                names = [field.name for field in chunk.type]
                if "bytes" not in names:
                    raise DataError(f"data.path: {self.file}, column of images: got fields {', '.join(names)}; wanted bytes")
                chunk = chunk.field("bytes")
            for value in chunk:
                yield value.as_py()


def split_words(name: str) -> set[str]:
    """Return the splits that words in the name of a file or folder tell."""
    return {_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS}


def _named_split(file: Path) -> str:
    """Return the split that a word in the file's name, or in that of the nearest of its folders, names; else train.

    Raises:
        DataError: One name has words of two splits.
    """
    for name in (file.stem, *reversed(file.parent.parts)):
        found = split_words(name)
        if len(found) > 1:
            raise DataError(
                f"data.path: the name {name!r} says {' and '.join(sorted(found))}; rename it, or add a column split"
            )
        if found:
            return found.pop()
    return "train"


def _numbered(tables: list[_Table]) -> tuple[str, ...]:
    """Name classes by their numbers, up to the largest label."""
    if text := next((table for table in tables if table.labels_are_text), None):
        raise DataError(
            f"data.classes: empty, and the labels of {text.file} are text; give all names, in the federation's order"
        )
    largest = max((int(table.raw_labels.max()) for table in tables if len(table.raw_labels)), default=0)
    if largest >= _MOST_CLASSES:
        raise DataError(
            f"data.path: {tables[0].file.parent} has labels up to {largest}; without data.classes, at most {_MOST_CLASSES - 1}"
        )
    if smallest := min((int(table.raw_labels.min()) for table in tables if len(table.raw_labels)), default=0):
        raise DataError(
            f"data.path: {tables[0].file.parent} has labels from {smallest} on; without data.classes, classes are numbered from 0"
        )
    return tuple(f"class {label}" for label in range(largest + 1))


def _hugging_face_features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """Return what the metadata that the library `datasets` writes says of each column; nothing where there is none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {str(name): feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _column(there: list[str], known: tuple[str, ...], kind: str, features: dict[str, dict[str, Any]]) -> str:
    """Return the column with one of the `known` names, else the only one of its kind, else the first known name."""
    of_kind = [name for name, feature in features.items() if feature.get("_type") == kind and name in there]
    named = [name for name in known if name in there]
    return named[0] if named else of_kind[0] if len(of_kind) == 1 else known[0]


def _listed(names: tuple[str, ...], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
