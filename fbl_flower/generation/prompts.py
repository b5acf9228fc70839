"""From a class to the text that a text-to-image model reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fbl_flower.errors import GeneratorError
from fbl_flower.seeding import derive

_FIELD = "{name}"
_SEPARATOR = " | "
_NUMBERED = re.compile(r"class \d+")  # what the reader of parquet files calls a class whose name nobody has given

# Simple and varied, after the prompts that CLIP was evaluated with (Radford et al., arXiv 2103.00020).
_PHOTO = (
    "a photo of a {name}", "a close-up photo of a {name}", "a bright photo of a {name}", "a cropped photo of a {name}",
    "a photo of a small {name}", "a photo of a large {name}", "a photo of one {name}", "a good photo of a {name}",
)  # fmt: skip
_SATELLITE = ("a centered satellite photo of {name}", "a satellite view of {name}", "an aerial image of {name} seen from above")
_DIGIT = (
    "a handwritten digit {name}, white on black", "the number {name} written by hand, white ink on a black background",
    "a scan of a handwritten {name}, white on black",
)  # fmt: skip
_FASHION = (
    "a grey product photo of a {name} on a black background", "a black and white photo of a {name}, dark background",
    "a {name} laid flat, monochrome product photo",
)  # fmt: skip

_TEMPLATES = {
    "mnist5k": _DIGIT, "mnist": _DIGIT, "digits": _DIGIT, "eurosat": _SATELLITE, "fashion-mnist": _FASHION,
    "cifar10": _PHOTO, "cifar100": _PHOTO, "tiny-imagenet": _PHOTO,
}  # fmt: skip

# What a class is called in a prompt where its own name is short, ambiguous, or no English; other names are taken as they are.
_NAMES: Mapping[str, Mapping[str, str]] = {
    "cifar10": {"automobile": "car", "deer": "deer, animal", "frog": "frog, animal", "truck": "lorry truck"},
    "cifar100": {
        "bed": "bed, furniture", "beetle": "beetle, insect", "bowl": "bowl, dish", "can": "tin can",
        "crab": "crab, animal", "keyboard": "computer keyboard",
        "mouse": "mouse, animal", "orange": "orange, fruit", "orchid": "orchid flower", "pear": "pear, fruit",
        "plain": "plain, grassland", "plate": "plate, dish", "ray": "stingray fish", "rose": "rose flower", "seal": "seal, animal",
        "skunk": "skunk, animal", "tank": "tank, military vehicle", "train": "railway train",
        "turtle": "turtle, animal", "worm": "earthworm",
    },
    "eurosat": {
        "annualcrop": "annual crop land", "forest": "forest", "herbaceousvegetation": "brushland", "highway": "highway or road",
        "industrial": "industrial buildings", "pasture": "pasture land", "permanentcrop": "permanent crop land",
        "residential": "residential buildings", "river": "river", "sealake": "sea or lake",
    },
    "fashion-mnist": {
        "tshirttop": "T-shirt", "tshirt": "T-shirt", "trouser": "pair of trousers", "pullover": "pullover sweater",
        "sandal": "sandal shoe", "bag": "handbag",
    },
    "tiny-imagenet": {
        "brass": "brass memorial plaque", "chest": "wooden chest", "crane": "construction crane", "drumstick": "drumstick for a drum",
        "monarch": "monarch butterfly", "nail": "metal nail", "organ": "pipe organ", "plate": "plate of food", "reel": "fishing reel",
        "tabby": "tabby cat", "torch": "burning torch",
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The texts of a data set.

    Attributes:
        templates: With {name} where the class goes.
        names: What each class is called, in the order of the labels.
    """

    templates: tuple[str, ...]
    names: tuple[str, ...]

    def text(self, label: int, seed: int) -> str:
        """Return the prompt of an image; its seed chooses the template."""
        return self.filled_in(self.templates[derive(seed, "prompt") % len(self.templates)], self.names[label])

    @staticmethod
    def filled_in(template: str, name: str) -> str:
        """Return a template with a class in it."""
        if name[:1].lower() in "aeiou":
            template = re.sub(r"\b([Aa]) \{name\}", r"\1n {name}", template)
        return template.replace(_FIELD, name)


def make_prompts(data_name: str, class_names: Sequence[str], override: str = "", class_words: str = "") -> Prompts:
    """Return the prompts of a data set.

    Args:
        data_name: Chooses the templates, and the words for classes whose names mislead; "a photo of a {name}" and its like for
            a data set that is not known here.
        class_names: In the order of the labels.
        override: `generator.prompt`: templates with {name}, separated by " | ", in place of the data set's own; or empty.
        class_words: `generator.class-words`: "class: word", separated by " | ", for the classes whose words are to be others; or empty.

    Raises:
        GeneratorError: A template lacks {name}, a word is for no class, or a class has no name that a model could read.
    """
    templates = tuple(part.strip() for part in override.split(_SEPARATOR)) if override.strip() else ()
    problems = [
        f"generator.prompt: got {template!r}; every text between ' | ' needs {_FIELD} where the class goes, and no other braces"
        for template in templates
        if _FIELD not in template or set("{}") & set(template.replace(_FIELD, ""))
    ]
    own, found = _read_class_words(class_words, class_names)
    problems += found
    numbers_read = bool(templates) or data_name in _TEMPLATES
    nameless = [
        label
        for label, name in enumerate(class_names)
        if name.strip() not in own
        and (not name.strip() or _NUMBERED.fullmatch(name.strip()) or (name.strip().isdigit() and not numbers_read))
    ]
    if nameless or not class_names:
        problems.append(
            f"generator.name: text-to-image needs the names of the classes; {data_name} has none for the labels "
            f"{', '.join(map(str, nameless)) or 'at all'}; name them (generator.class-words), use generator.prompt if they are numbers, or another generator"
        )
    if problems:
        raise GeneratorError("\n".join(problems))
    known = _NAMES.get(data_name, {})
    words = (
        own.get(name.strip(), known.get(re.sub(r"[^a-z]", "", name.lower()), name.replace("_", " ").strip()))
        for name in class_names
    )
    return Prompts(templates=templates or _TEMPLATES.get(data_name, _PHOTO), names=tuple(words))


def _read_class_words(text: str, class_names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the word of each class that `generator.class-words` names, and what is wrong with it."""
    words, problems = {}, []
    for part in text.split(_SEPARATOR) if text.strip() else ():
        name, colon, word = (piece.strip() for piece in part.partition(":"))
        if not (colon and word) or set("{}") & set(word):
            problems.append(
                f"generator.class-words: got {part.strip()!r}; wanted 'class: word', without braces, separated by ' | '"
            )
        elif name not in (known := [other.strip() for other in class_names]):
            problems.append(f"generator.class-words: no class {name!r}; the classes are {', '.join(known)}")
        words[name] = word
    return words, problems
