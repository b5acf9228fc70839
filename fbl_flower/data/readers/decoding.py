"""From encoded images (JPEG, PNG, ...) to one array.

One image after the other: on two busy cores, a pool of threads was no faster for small images.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fbl_flower.data.readers.source import ImageFormat
from fbl_flower.errors import DataError

_ORIENTATION = 0x0112  # tag of EXIF


def decode_images(images: Iterable[bytes | Path | None], wanted: ImageFormat, where: Callable[[int], str]) -> np.ndarray:
    """Decode images to uint8 [N, C, H, W].

    Args:
        images: Contents, or files.
        wanted: Their size and channels. Colour is made grey, and grey colour, as `wanted.channels` says.
        where: Names the i-th image in messages.

    Raises:
        DataError: An image cannot be decoded, or is of another size; the message names it.
    """
    arrays: list[np.ndarray] = []
    for i, image in enumerate(images):
        pixels = _decode(image, wanted, where, i)
        if not wanted.native and arrays and pixels.shape[1:] != arrays[0].shape[1:]:
            raise DataError(
                f"data.image-size: 0, and the images differ: {where(i)} has {_size(pixels)} pixels, and {where(0)} "
                f"{_size(arrays[0])}; give the height and width that all are scaled to"
            )
        arrays.append(pixels)
    if not arrays:
        raise DataError(f"data.path: no images for {wanted.name}")
    height, width = arrays[0].shape[1:]
    if height != width:
        raise DataError(
            f"data.image-size: 0, and {where(0)} has {_size(arrays[0])} pixels; images must be square: give the height and width "
            "that all are scaled and cropped to"
        )
    channels = wanted.channels or max(len(pixels) for pixels in arrays)
    whole = np.empty((len(arrays), channels, height, width), dtype=np.uint8)
    for i in range(len(arrays)):
        whole[i] = arrays[i]
        arrays[i] = whole[i]  # frees the image: a data set is not in memory twice
    return whole


def _decode(content: bytes | Path | None, wanted: ImageFormat, where: Callable[[int], str], i: int) -> np.ndarray:
    """Decode one image to uint8 [1 or 3, H, W]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as opened:  # type: ignore[arg-type]
            file = _in_8_bits(_turned_upright(opened) if wanted.upright else opened, of_16=opened.format in ("PNG", "PPM"))
            mode = {1: "L", 3: "RGB"}.get(wanted.channels) or ("L" if file.mode in ("1", "L") else "RGB")
            image = file.convert(mode)
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"data.path: {where(i)}: not an image ({error})") from error
    if wanted.native and image.size != (wanted.native, wanted.native):
        raise DataError(
            f"data.path: {where(i)}: {image.size[0]} x {image.size[1]} pixels; {wanted.name} has {wanted.native} x {wanted.native}"
        )
    if not wanted.native and wanted.size and image.size != (wanted.size, wanted.size):
        image = ImageOps.fit(image, (wanted.size, wanted.size), method=Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def _turned_upright(image: Any) -> Any:
    """Turn an image as its EXIF orientation says. Pillow's own function also writes the other tags anew, and fails over damaged ones."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # of many kinds; a file whose tags cannot be read says nothing of how it was held
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _in_8_bits(image: Any, *, of_16: bool) -> Any:
    """Scale grey images of 16 bits to 8; Pillow itself would cut off all above 255.

    Args:
        image: As Pillow reads it.
        of_16: Its file's format has 16 bits at most, as PNG and PGM have: Pillow's mode of 32 bits holds no more then.

    Raises:
        ValueError: 32-bit whole numbers or floats: what is white in them is not known.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and of_16):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"Pillow's mode {image.mode}, 32 bits a pixel; wanted 8 or 16 bits")
    return image


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[2]} x {pixels.shape[1]}"
