"""Which directories of a folder are splits, and which are classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fbl_flower.data.readers.formats import is_image
from fbl_flower.data.readers.names import name_of, shown
from fbl_flower.data.readers.notes import Notes, is_hidden
from fbl_flower.data.readers.splits import HELD_OUT, means_no_split, pick_test_split, split_named
from fbl_flower.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The folders that hold class directories.

    Attributes:
        train: Of the training images.
        test: Of the test split; None where there is none.
    """

    train: Path
    test: Path | None = None

    @property
    def roots(self) -> list[Path]:
        """Training images, then the test split if there is one."""
        return [self.train, self.test] if self.test else [self.train]


def find_layout(path: Path, class_names: tuple[str, ...], notes: Notes) -> Layout:
    """Tell splits from classes: a split has class directories in it, and a class has images, whatever it is called.

    Args:
        path: The folder.
        class_names: Those of the federation; empty: to be found in the folder.
        notes: Where to say which splits are left out.

    Raises:
        DataError: Split folders have others beside them, or none of them is for training, or images are directly in them.
    """
    found = directories(path)
    split_of = {d: split for d in found if (split := split_named(name_of(d)))}
    if not any(not images_in(d) and directories(d) for d in split_of):
        _check_classes(path, found, split_of, class_names)
        return Layout(train=path)
    if others := [d.name for d in found if d not in split_of]:
        raise DataError(
            f"data.path: {shown(path)} has the splits {_listed([d.name for d in split_of])}, and beside them {_listed(others)}, which is no split "
            "that is known. Move them away, or into the training split; or rename them to train, test or validation"
        )
    by_split: dict[str, list[Path]] = {}
    for directory, split in split_of.items():
        by_split.setdefault(split, []).append(directory)
    for split, same in by_split.items():
        if len(same) > 1:
            raise DataError(
                f"data.path: {shown(path)} has several folders for the split {split}: {_listed([d.name for d in same])}. Merge or rename them"
            )
    if "train" not in by_split:
        raise DataError(
            f"data.path: {shown(path)} has the splits {_listed([d.name for d in split_of])} and no training split; expected a folder train"
        )
    test = pick_test_split(by_split)
    if left := [by_split[split][0].name for split in HELD_OUT if split in by_split and split != test]:
        notes.say(f"left out: the splits {_listed(left)}; {shown(by_split[test][0].name) if test else ''} is the test split")
    return Layout(train=by_split["train"][0], test=by_split[test][0] if test else None)


def directories(path: Path) -> list[Path]:
    """Return the directories in a folder that are not hidden, in the order of their names."""
    return [d for d in entries(path) if d.is_dir() and not is_hidden(d)]


def images_in(directory: Path) -> list[Path]:
    """Return the images directly in a folder, in the order of their names."""
    return [file for file in entries(directory) if is_image(file)]


def entries(path: Path) -> list[Path]:
    """Return what is in a folder, in the order of the names."""
    if not path.is_dir():
        raise DataError(f"data.path: no folder at {shown(path)}; wanted a folder of images")
    try:
        return sorted(path.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"data.path: {shown(path)} cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def _check_classes(path: Path, found: list[Path], split_of: dict[Path, str], class_names: tuple[str, ...]) -> None:
    """Raise an error where images lie directly in folders that are named after splits, and nobody says that these are classes."""
    suspicious = [d for d in found if (d in split_of or means_no_split(name_of(d))) and name_of(d) not in class_names]
    known = [d for d in suspicious if d in split_of]
    if known and (len(suspicious) == len(found) or len({split_of[d] for d in known}) > 1) and any(map(images_in, known)):
        raise DataError(
            f"data.path: images directly in {_listed([shown(d) for d in known])}, named after splits; such a folder has no class directories. "
            f"Expected {shown(known[0])}/CLASS/IMAGE.png; or set data.classes, if these are classes"
        )


def _listed(names: list[str], most: int = 10) -> str:
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
