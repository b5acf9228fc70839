"""From encoded images (JPEG, PNG, ...) to one array.

One image after the other: on two busy cores, a pool of threads was no faster for small images.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fbl_flower.data.identity import pixel_key
from fbl_flower.data.readers.damage import end_of_image, has_check
from fbl_flower.data.readers.formats import image_formats
from fbl_flower.data.readers.notes import ALL_TRANSPARENT, SEVERAL_FRAMES, TRAILING_DATA, Notes
from fbl_flower.data.readers.opaque import opaque_8_bits, raw_mode
from fbl_flower.data.readers.source import ImageFormat
from fbl_flower.errors import DataError

MOST_PIXELS = 50_000_000  # of one image, as its header says: a small file can hold more than the memory does
_MOST_SHOWN = 20
_ORIENTATION = 0x0112  # tag of EXIF
_FRAMES = ("GIF", "PNG", "TIFF", "WEBP", "AVIF", "FLI", "DCX")  # elsewhere, further frames are previews or layers


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Images of one data set.

    Attributes:
        pixels: uint8 [N, C, H, W].
        keys: uint64 [N], of each image's pixels before they were scaled, or made grey or colour.
    """

    pixels: np.ndarray
    keys: np.ndarray


def decode_images(
    images: Iterable[bytes | Path | None], wanted: ImageFormat, where: Callable[[int], str], notes: Notes | None = None
) -> Decoded:
    """Decode images to uint8 [N, C, H, W].

    Args:
        images: Contents, or files.
        wanted: Their size and channels. Colour is made grey, and grey colour, as `wanted.channels` says.
        where: Names the i-th image in messages.
        notes: Where to count images with several frames and the like.

    Raises:
        DataError: Images are damaged, too large, or of another size; the message names them.
    """
    arrays: list[np.ndarray] = []
    keys: list[int] = []
    problems: list[str] = []
    notes = notes or Notes()
    with warnings.catch_warnings():
        from PIL.Image import DecompressionBombWarning

        warnings.simplefilter("error", DecompressionBombWarning)
        for i, image in enumerate(images):
            try:
                pixels, key, remarks = _decode(image, wanted)
            except _Refused as problem:
                problems.append(f"{where(i)}: {problem}")
                continue
            for remark in remarks:
                notes.image(remark, where(i))
            if not wanted.native and arrays and pixels.shape[1:] != arrays[0].shape[1:]:
                raise DataError(
                    f"data.image-size: 0, and the images differ: {where(i)} has {_size(pixels)} pixels, and {where(0)} "
                    f"{_size(arrays[0])}; give the height and width that all are scaled to"
                )
            if not problems:
                arrays.append(pixels)
                keys.append(key)
    if problems:
        raise DataError(_listed(problems))
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
    return Decoded(pixels=whole, keys=np.array(keys, dtype=np.uint64))


class _Refused(Exception):
    """An image that cannot be used, and why."""


def _decode(content: bytes | Path | None, wanted: ImageFormat) -> tuple[np.ndarray, int, list[str]]:
    """Decode one image to uint8 [1 or 3, H, W], with its key and remarks for the notes.

    Raises:
        _Refused: It cannot be used. Pillow and its decoders raise errors of any kind for a damaged file.
    """
    from PIL import Image, UnidentifiedImageError

    if content is None:
        raise _Refused("no image")
    try:
        return _pixels(content, wanted)
    except (_Refused, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Refused(f"too large ({error}); at most {MOST_PIXELS:,} pixels are read. Scale it down") from error
    except UnidentifiedImageError as error:
        raise _Refused("not an image") from error
    except OSError as error:
        if error.errno:
            raise _Refused(f"not an image that can be read ({error.strerror})") from error
        raise _Refused(f"damaged image ({error})") from error
    except Exception as error:
        raise _Refused(f"damaged image ({type(error).__name__}: {error})") from error


def _pixels(content: bytes | Path, wanted: ImageFormat) -> tuple[np.ndarray, int, list[str]]:
    """Check the header, then load the pixels, then all the rest: what loads them later would hide an error."""
    from PIL import Image, ImageOps

    remarks = []
    with ExitStack() as stack:
        stream: IO[bytes] = stack.enter_context(content.open("rb") if isinstance(content, Path) else io.BytesIO(content))
        opened = stack.enter_context(Image.open(stream, formats=image_formats()))
        _check_header(opened.size, wanted)
        kind, raw = opened.format, raw_mode(opened)
        opened.load()
        if has_check(kind):
            stream.seek(0)
            data = stream.read()
            if end_of_image(data, kind) < len(data) and kind != "MPO":  # whose further images are previews
                remarks.append(TRAILING_DATA)
        upright = _turned_upright(opened) if wanted.upright else opened
        image, grey, visible = opaque_8_bits(upright, raw, of_16=kind in ("PNG", "PPM"), background=wanted.background)
        own_mode = "L" if grey else "RGB"
        own = image.convert(own_mode)
        image = image.convert({1: "L", 3: "RGB"}.get(wanted.channels, own_mode))
        if not visible:
            remarks.append(ALL_TRANSPARENT)
        if kind in _FRAMES and getattr(opened, "n_frames", 1) > 1:
            remarks.append(SEVERAL_FRAMES)
    if not wanted.native and wanted.size and image.size != (wanted.size, wanted.size):
        image = ImageOps.fit(image, (wanted.size, wanted.size), method=Image.Resampling.BILINEAR)
    pixels = _channels_first(image)
    # Where all images have one native form, the key is of that: the same in every kind of file.
    return pixels, pixel_key(pixels if wanted.native else _channels_first(own)), remarks


def _channels_first(image: Any) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def _check_header(size: tuple[int, int], wanted: ImageFormat) -> None:
    width, height = size
    if wanted.native and size != (wanted.native, wanted.native):
        raise _Refused(f"{width} x {height} pixels; {wanted.name} has {wanted.native} x {wanted.native}")
    if width * height > MOST_PIXELS:
        raise _Refused(f"too large ({width} x {height} pixels); at most {MOST_PIXELS:,} pixels are read. Scale it down")


def _turned_upright(image: Any) -> Any:
    """Turn an image as its EXIF orientation says. Pillow's own function also writes the other tags again, and fails over damaged ones."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # of many kinds; the pixels are loaded, and tags that cannot be read do not say how the camera was held
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _listed(problems: list[str]) -> str:
    """Return one message for all images that cannot be used."""
    if len(problems) == 1:
        return f"data.path: {problems[0]}"
    lines = "".join(f"\n  - {problem}" for problem in problems[:_MOST_SHOWN])
    more = f"\n  and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
    return f"data.path: {len(problems)} images cannot be used:{lines}{more}"


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[2]} x {pixels.shape[1]}"
