"""Damage that a decoder passes over: checksums, and markers at the end of an image.

Each function walks a file's blocks by their lengths and decodes nothing. Wrong bytes inside compressed pixels that still decode, as in a
JPEG, have no checksum: they cannot be found.
"""

from __future__ import annotations

import re
import struct
import zlib

_JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)  # FF 00 is a byte of pixels, FF D0 .. D7 a restart
_CUT_OFF = "it is cut off: no end-of-image marker"


def end_of_image(content: bytes, image_format: str | None) -> int:
    """Return where an image ends in its file; data behind that belongs to somebody else.

    Args:
        content: The file.
        image_format: As Pillow calls it; formats without a check end with the file.

    Raises:
        ValueError: A checksum is wrong, or blocks are missing.
    """
    match image_format:
        case "PNG":
            return _png_end(content)
        case "JPEG" | "MPO":
            return _jpeg_end(content)
        case "GIF":
            try:
                return _gif_end(content)
            except IndexError as error:
                raise ValueError(_CUT_OFF) from error
        case "WEBP":
            return _webp_end(content)
    return len(content)


def has_check(image_format: str | None) -> bool:
    """Return whether `end_of_image` knows the format."""
    return image_format in ("PNG", "JPEG", "MPO", "GIF", "WEBP")


def _png_end(content: bytes) -> int:
    """A chunk: length, name, data, and the CRC-32 of name and data."""
    view, position = memoryview(content), 8
    while position + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if end > len(content):
            break
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ValueError(f"the checksum of its chunk {name.decode('latin-1')} is wrong")
        position = end
        if name == b"IEND":
            return position
    raise ValueError(_CUT_OFF)


def _jpeg_end(content: bytes) -> int:
    """A segment: marker and length; behind a start of scan come pixels up to the next marker."""
    position = 2
    while True:
        marker = _JPEG_MARKER.match(content, position)
        if marker is None:
            raise ValueError(f"no marker at byte {position}" if position < len(content) - 1 else _CUT_OFF)
        kind, position = content[marker.end() - 1], marker.end()
        if kind == 0xD9:  # end of image
            return position
        if kind == 0x01:  # without a length
            continue
        position += int.from_bytes(content[position : position + 2], "big")
        if kind == 0xDA:  # start of scan
            following = _JPEG_MARKER.search(content, position)
            if following is None:
                raise ValueError(_CUT_OFF)
            position = following.start()


def _gif_end(content: bytes) -> int:
    """Extensions and images, each followed by blocks of at most 255 bytes, then a trailer."""
    position = 13 + _colour_table(content[10])
    while content[position] != 0x3B:
        if content[position] == 0x2C:
            position += 11 + _colour_table(content[position + 9])
        elif content[position] == 0x21:
            position += 2
        else:
            raise ValueError(f"no block at byte {position}")
        while content[position]:
            position += 1 + content[position]
        position += 1
    return position + 1


def _colour_table(flags: int) -> int:
    return 3 * 2 ** (1 + flags % 8) if flags & 0x80 else 0


def _webp_end(content: bytes) -> int:
    """One RIFF chunk, whose length counts from byte 8."""
    end = 8 + int.from_bytes(content[4:8], "little")
    if end > len(content):
        raise ValueError(_CUT_OFF)
    return end + end % 2
