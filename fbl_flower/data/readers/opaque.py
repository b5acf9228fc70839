"""Transparent images over a ground, and 16 bits as 8: what Pillow's own conversions would drop without a word."""

from __future__ import annotations

from typing import Any

import numpy as np

_SCALE = {"L;2": 85, "L;4": 17}  # grey values of few bits are scaled to 8 bits, and the transparent one in the header is not


def raw_mode(image: Any) -> str:
    """Return how an opened image stores its pixels (`RGB;16B`); it must not be loaded yet."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def opaque_8_bits(image: Any, raw: str, *, of_16: bool, background: tuple[int, int, int]) -> tuple[Any, bool, bool]:
    """Return the image with 8 bits a channel and without transparency.

    Args:
        image: As Pillow has loaded it.
        raw: Its `raw_mode`.
        of_16: The file's format has 16 bits at most, as PNG and PGM have: Pillow's mode of 32 bits holds no more then.
        background: Ground that shows through, red, green, blue.

    Returns:
        The image, whether it is grey, and whether any of it is visible.

    Raises:
        ValueError: 32-bit whole numbers or floats: what is white in them is not known.
    """
    from PIL import Image

    key = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and of_16):
        values = np.asarray(image)
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))  # Pillow itself would cut off all above 255
        if isinstance(key, int):
            image = Image.merge("LA", (image, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))
    elif image.mode in ("I", "F"):
        raise ValueError(f"Pillow's mode {image.mode}, 32 bits a pixel; wanted 8 or 16 bits")
    elif isinstance(key, int) and raw in _SCALE:
        image.info["transparency"] = key * _SCALE[raw]
    elif isinstance(key, tuple) and raw.startswith("RGB;16"):
        image.info["transparency"] = tuple(value >> 8 for value in key)  # Pillow keeps the upper 8 bits of each pixel
    grey = image.mode in ("1", "L", "LA", "La")
    if not image.has_transparency_data:
        return image, grey, True
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    visible = image.getextrema()[3][1] > 0
    ground = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(ground, image), grey and len(set(background)) == 1, visible
