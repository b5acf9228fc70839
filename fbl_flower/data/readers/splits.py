"""Words for splits: which names of files, folders and values mean training, and which mean held-out images."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SYNONYMS = {
    "train": ("train", "training", "trainset"),
    "test": ("test", "testing", "testset"),
    "eval": ("eval", "evaluation"),
    "holdout": ("holdout", "heldout"),
    "validation": ("validation", "valid", "val", "valset"),
    "dev": ("dev", "devel", "development"),
}
HELD_OUT = tuple(split for split in _SYNONYMS if split != "train")  # the first of them that is there is the test split
_SPLIT_OF = {word: split for split, words in _SYNONYMS.items() for word in words}
_NO_SPLIT = {
    "unlabeled", "unlabelled", "unsupervised", "unannotated", "extra", "submission", "submit", "predict", "prediction", "predictions",
    "pool", "unused", "ignore",
}  # fmt: skip
_FILLER = {"set", "data", "dataset", "image", "images", "img", "imgs", "split", "part", "sample", "samples"}
_UUID = re.compile(r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}")


def words_of(name: str) -> list[str]:
    """Return the words in a name, in lower case, without numbers; `held-out` is one word."""
    text = " ".join(word for word in re.split(r"[\W\d_]+", _UUID.sub("", name.lower())) if word)
    return re.sub(r"\b(held|hold) out\b", r"\1out", text).split()


def split_named(name: str) -> str | None:
    """Return the split that a name means as a whole, as `Test`, `train_images` or `held-out` do; None where it means another thing."""
    found = [word for word in words_of(name) if word not in _FILLER]
    return _SPLIT_OF.get(found[0]) if len(found) == 1 else None


def splits_in(name: str) -> set[str]:
    """Return the splits that words in a name tell, as in `digits-test`."""
    return {_SPLIT_OF[word] for word in words_of(name) if word in _SPLIT_OF}


def no_split_in(name: str) -> set[str]:
    """Return the words in a name that mean images without a use here, such as unlabeled ones."""
    return _NO_SPLIT & set(words_of(name))


def means_no_split(name: str) -> bool:
    """Tell whether a name as a whole means images without a use here."""
    found = [word for word in words_of(name) if word not in _FILLER]
    return len(found) == 1 and found[0] in _NO_SPLIT


def same_but_for_numbers(names: Iterable[str]) -> bool:
    """Tell whether names differ in numbers only, as the parts of one data set do."""
    return len({tuple(words_of(name)) for name in names}) <= 1


def pick_test_split(there: Iterable[str]) -> str | None:
    """Return the split to test on: the first of the stated order."""
    return next((split for split in HELD_OUT if split in set(there)), None)


def known_words() -> str:
    """Return the words that are understood, for messages."""
    return ", ".join(_SPLIT_OF)
