"""Parquet files with encoded images: one file with a column split, or files as the Hugging Face hub stores them.

Columns: image (or img), as bytes or as a struct with bytes; label (or fine_label, labels), as whole numbers or as names, or the only ones
that the Hugging Face metadata calls an image and a class label; and split, without which the names of files and folders tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path, PurePath

import numpy as np

from fbl_flower.data.readers.decoding import decode_images
from fbl_flower.data.readers.names import shown
from fbl_flower.data.readers.notes import Notes
from fbl_flower.data.readers.parquet_file import LABEL, ParquetImages
from fbl_flower.data.readers.source import ImageFormat, Source, check_labels, examples, walk
from fbl_flower.data.readers.splits import (
    HELD_OUT,
    known_words,
    means_no_split,
    no_split_in,
    pick_test_split,
    same_but_for_numbers,
    split_named,
    splits_in,
)
from fbl_flower.errors import DataError

_MOST_CLASSES = 10_000  # a larger label is no class, but something else in the column


def read_parquet(path: Path, wanted: ImageFormat, *, needs_test: bool) -> Source:
    """Read the file, or all `*.parquet` below the folder.

    The first held-out split, in the order of `HELD_OUT`, is the test split; others are left out, and the notes say so.

    Args:
        path: A file or a folder.
        wanted: Without class names, those of the Hugging Face metadata are taken, else "class 0", "class 1", ...
        needs_test: Whether a data set without a test split is an error.

    Raises:
        DataError: There are several configurations or unknown splits; a file is damaged, lacks a column, or holds a label outside the
            classes or an image that cannot be decoded.
    """
    files, notes = parquet_files(path) if path.is_dir() else [path], Notes()
    if not files:
        raise DataError(f"data.path: no file *.parquet in {shown(path)}; wanted the parquet files of {wanted.name}")
    relative = [file.relative_to(path) if path.is_dir() else PurePath(file.name) for file in files]
    _check_folders(path, relative)
    tables = [ParquetImages(file, needs_split=needs_test and len(files) == 1) for file in files]
    names = wanted.class_names or next((t.class_names for t in tables if t.class_names), None) or _numbered(tables)
    labels = [_labels(table, names, wanted) for table in tables]
    of_rows = _splits(path, relative, tables)
    there = Counter(split for splits in of_rows for split in splits)
    test = pick_test_split(there)
    for needed in ("train", *(["test"] if needs_test and test is None else [])):
        if needed not in there:
            raise DataError(f"data.path: {shown(path)} has no rows with split {needed!r}; wanted train and test")
    if left := [f"{split} ({there[split]} rows)" for split in HELD_OUT if split in there and split != test]:
        notes.say(f"left out: the splits {', '.join(left)}; {test} is the test split")
    if path.is_dir():
        notes.pass_over(below / name for below, found in walk(path) for name in found if not name.endswith(".parquet"))
    rows = [(t, i) for t in tables for i in range(t.num_rows)]
    split, label = np.concatenate(of_rows), np.concatenate(labels)
    used = (split == "train") | (split == test)
    index = np.flatnonzero(used)
    images = (blob for blob, wanted_row in zip(chain.from_iterable(t.blobs() for t in tables), used, strict=True) if wanted_row)
    decoded = decode_images(images, wanted, lambda i: f"{shown(rows[index[i]][0].file)}, row {rows[index[i]][1]}", notes)
    train, held_out = split[used] == "train", split[used] == test
    return Source(
        class_names=names,
        train=examples(decoded.pixels[train], label[used][train]),
        test=examples(decoded.pixels[held_out], label[used][held_out]) if test else None,
        notes=notes.lines(),
        train_keys=decoded.keys[train],
        test_keys=decoded.keys[held_out],
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
    outermost = {file.parts[0] for file in files if len(file.parts) > 1}
    return sorted(name for name in outermost if not splits_in(name) and not means_no_split(name))


def _check_folders(path: Path, files: Sequence[PurePath]) -> None:
    """Raise an error for folders that are parts of another kind than splits."""
    for file in files:
        for part in file.parts[:-1]:
            if part.partition("=")[1] and part.partition("=")[0].lower() in LABEL:
                raise DataError(
                    f"data.path: {shown(path)} has a folder for each label ({shown(part)}, as Hive and Spark partition). Expected the "
                    f"column {part.partition('=')[0]} in the files: write them without partitions, or one class folder of images for each label"
                )
    if len(kinds := configurations(files)) > 1:
        raise DataError(
            f"data.path: {shown(path)} has several configurations: {', '.join(map(shown, kinds))}; the training images of one may be the "
            f"test images of another: choose one, such as {shown(path / kinds[0])}, or, if they are parts of one data set, put their files "
            "into one folder"
        )


def _splits(path: Path, files: Sequence[PurePath], tables: list[ParquetImages]) -> list[np.ndarray]:
    """Return the split of each row: what its column says, else what the file's name says."""
    unknown: Counter[str] = Counter()
    found: list[np.ndarray | None] = []
    for table in tables:
        if table.split_values is None:
            found.append(None)
            continue
        meaning = {value: split_named(str(value)) for value in set(table.split_values)}
        unknown.update(repr(value) for value in table.split_values if meaning[value] is None)
        found.append(np.array([meaning[value] for value in table.split_values], dtype=object))
    if unknown:
        listed = ", ".join(f"{value} ({number} rows)" for value, number in unknown.most_common(10))
        raise DataError(
            f"data.path: {shown(path)}, column split: got {listed}. Expected words for training or held-out images: {known_words()}. "
            "Rename these values, or remove the rows"
        )
    by_name = {i: _split_of_file(file) for i, file in enumerate(files) if found[i] is None}
    nameless = [i for i, split in by_name.items() if split is None]
    if nameless and len(nameless) < len(files):
        names = _listed([shown(str(files[i])) for i in nameless])
        raise DataError(
            f"data.path: {shown(path)} has files of known splits, and beside them {names}, whose names tell no split. "
            f"Move them away, or name them with one of {known_words()}, or add a column split"
        )
    if len(nameless) > 1 and not same_but_for_numbers(str(files[i]) for i in nameless):
        raise DataError(
            f"data.path: {shown(path)} has files of different names that tell no split: {_listed([shown(str(files[i])) for i in nameless])}. "
            "Expected train and test in the names, or a column split; files that differ in numbers only are training images"
        )
    if len(nameless) == len(files) and any(means_no_split(part) for file in files for part in (file.stem, *file.parts[:-1])):
        raise DataError(
            f"data.path: {_listed([shown(str(file)) for file in files])}: named as images that are not for training; rename them, or add a column split"
        )
    return [
        splits if splits is not None else np.full(table.num_rows, by_name[i] or "train", dtype=object)
        for i, (splits, table) in enumerate(zip(found, tables, strict=True))
    ]


def _split_of_file(file: PurePath) -> str | None:
    """Return the split that a word in the file's name, or in that of the nearest of its folders, names; None: no word does.

    Raises:
        DataError: One name has words of two splits.
    """
    for name in (file.stem, *reversed(file.parent.parts)):
        found, others = splits_in(name), no_split_in(name)
        if len(found) > 1 or (found and others):
            raise DataError(
                f"data.path: the name {shown(name)!r} says {' and '.join(sorted(found | others))}; rename it, or add a column split"
            )
        if found:
            return found.pop()
        if means_no_split(name):
            return None
    return None


def _labels(table: ParquetImages, names: tuple[str, ...], wanted: ImageFormat) -> np.ndarray:
    """Return a file's labels as int64 [N] in the order of `names`.

    Names count where the file has them. A packaged data set's files may spell some otherwise: there the number counts, if the
    others are in our order.
    """
    raw, own = table.labels, table.class_names
    if not table.labels_are_text:
        if len(raw):
            check_labels(raw, len(own or names), where=shown(table.file), name=wanted.name)
        if own is None or own == names:
            if len(raw):
                check_labels(raw, len(names), where=shown(table.file), name=wanted.name)
            return raw.astype(np.int64)
        order = [_label_of(name, names, wanted) for name in own]
        if wanted.native and None in order:
            if other := next((name for i, name in enumerate(own) if order[i] not in (None, i)), None):
                raise DataError(
                    f"data.path: {shown(table.file)} has the class {other!r} at another place than {wanted.name}, and classes of unknown names"
                )
            check_labels(raw, len(names), where=shown(table.file), name=wanted.name)
            return raw.astype(np.int64)
        text = [own[label] for label in np.unique(raw)]
    else:
        text = sorted(set(raw))
    label = {name: _label_of(name, names, wanted) for name in text}
    if unknown := [name for name in text if label[name] is None]:
        raise DataError(
            f"data.path: {shown(table.file)} has the label {sorted(unknown)[0]!r}; the classes are {_listed(list(names))}"
        )
    return np.array([label[value if table.labels_are_text else own[value]] for value in raw], dtype=np.int64)  # type: ignore[index]


def _label_of(name: str, names: tuple[str, ...], wanted: ImageFormat) -> int | None:
    return wanted.label_of(name) if wanted.class_names else names.index(name) if name in names else None


def _numbered(tables: list[ParquetImages]) -> tuple[str, ...]:
    """Name classes by their numbers, up to the largest label."""
    if text := next((table for table in tables if table.labels_are_text), None):
        raise DataError(
            f"data.classes: empty, and the labels of {shown(text.file)} are text; give all names, in the federation's order"
        )
    folder = shown(tables[0].file.parent)
    largest = max((int(table.labels.max()) for table in tables if len(table.labels)), default=0)
    if largest >= _MOST_CLASSES:
        raise DataError(f"data.path: {folder} has labels up to {largest}; without data.classes, at most {_MOST_CLASSES - 1}")
    if smallest := min((int(table.labels.min()) for table in tables if len(table.labels)), default=0):
        raise DataError(f"data.path: {folder} has labels from {smallest} on; without data.classes, classes are numbered from 0")
    return tuple(f"class {label}" for label in range(largest + 1))


def _listed(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
