"""Which files are images: the formats that Pillow decodes by itself, and the endings of their names."""

from __future__ import annotations

import functools
from pathlib import PurePath

_COMMON = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")  # tried first
_NOT_IMAGES = {
    "EPS",  # PostScript: needs Ghostscript
    "MPEG",  # video: Pillow reads its size only
    "IPTC",  # notes about a picture
}


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that can be decoded, common ones first."""
    return tuple(sorted(set(_suffixes().values()), key=_order))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the endings of image files, in lower case, with the dot."""
    return frozenset(_suffixes())


def is_image(file: PurePath) -> bool:
    """Tell by its name whether a file is an image that is not hidden."""
    return file.suffix.lower() in image_suffixes() and not file.name.startswith(".")


@functools.cache
def _suffixes() -> dict[str, str]:
    from PIL import Image, ImageFile

    Image.init()
    found = {}
    for suffix, name in Image.registered_extensions().items():
        name = "JPEG" if name == "MPO" else name  # several JPEGs in one file, opened as one
        if name not in Image.OPEN or name in _NOT_IMAGES:
            continue
        factory = Image.OPEN[name][0]
        if not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)):  # stubs need another program
            found[suffix.lower()] = name
    return found


def _order(name: str) -> tuple[bool, int, str]:
    """Common formats come first, and last those without a signature, which Pillow recognises by trying."""
    from PIL import Image

    return Image.OPEN[name][1] is None, _COMMON.index(name) if name in _COMMON else len(_COMMON), name
