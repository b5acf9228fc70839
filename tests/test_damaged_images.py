"""Images that are damaged, too large, transparent or of several frames, in every format that can be written here."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import write_folder
from PIL import Image

from fbl_flower.config import DataConfig, parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.data.readers.decoding import MOST_PIXELS, decode_images
from fbl_flower.data.readers.notes import Notes
from fbl_flower.data.readers.source import ImageFormat
from fbl_flower.errors import ConfigError, DataError

RNG = np.random.default_rng(5)
NOISE = Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8))
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "TGA", "PCX", "AVIF"]


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, *, rows: bytes, before: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def decode(
    *images: bytes, channels: int = 0, notes: Notes | None = None, background: tuple[int, int, int] = (255, 255, 255)
) -> np.ndarray:
    wanted = ImageFormat(name="folder", class_names=None, channels=channels, background=background, upright=True)
    return decode_images(list(images), wanted, lambda i: f"image {i}", notes).pixels


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_cut_image_of_any_format_is_named(image_format: str, share: float) -> None:
    good = encoded(NOISE, image_format)
    assert decode(good).shape == (1, 3, 24, 24)
    with pytest.raises(DataError, match="image 1: (damaged|not an) image"):
        decode(good, good[: int(share * len(good))])


@pytest.mark.parametrize(("image_format", "lost"), [("JPEG", 2), ("GIF", 1), ("PNG", 12)])
def test_a_missing_end_marker_is_damage(image_format: str, lost: int) -> None:
    """All pixels are there; of GIF and PNG, Pillow says nothing."""
    with pytest.raises(DataError, match="image 0: damaged image .*(cut off: no end-of-image marker|is truncated)"):
        decode(encoded(NOISE, image_format)[:-lost])


@pytest.mark.parametrize("position", range(33, 1700, 171))
def test_each_wrong_byte_of_a_png_is_found(position: int) -> None:
    content = bytearray(encoded(NOISE, "PNG"))
    content[position] ^= 0x10
    with pytest.raises(DataError, match="image 0: damaged image"):
        decode(bytes(content))


def test_a_scan_of_jpeg_that_holds_a_stray_marker() -> None:
    content = encoded(NOISE, "JPEG")
    middle = content.index(b"\xff\xda") + 200
    with pytest.raises(DataError, match="image 0: damaged image"):
        decode(content[:middle] + b"\xff\x31\x00\x02" + content[middle:])


@pytest.mark.parametrize("before", [chunk(b"iCCP", b""), chunk(b"pHYs", b""), chunk(b"tRNS", b""), chunk(b"gAMA", b"")])
def test_errors_of_any_kind_name_the_image(before: bytes) -> None:
    """Valid checksums and empty chunks: Pillow raises IndexError, struct.error and others."""
    rows = (b"\0" + bytes(8 * 3)) * 8
    with pytest.raises(DataError, match="image 0: (damaged|not an) image"):
        decode(png(8, 8, 8, 2, rows=rows, before=before))


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 30, "bee": 30})
    files = sorted(tmp_path.rglob("*.png"))
    for file in files[:25]:
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError) as caught:
        load_parts(DataConfig(name="folder", path=str(tmp_path)))
    text = str(caught.value)
    assert "25 images cannot be used" in text and text.endswith("and 5 more")
    assert all(str(file) in text for file in files[:20]) and str(files[20]) not in text


def test_damaged_images_of_a_named_data_set_in_parquet(tmp_path: Path) -> None:
    good = encoded(NOISE.resize((32, 32)), "PNG")
    blobs = [good, good[:-30], good, good[:70] + bytes([good[70] ^ 1]) + good[71:]]
    table = {"image": blobs, "label": [0, 1, 2, 3], "split": ["train", "train", "test", "test"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"(?s)2 images cannot be used.*row 1: damaged.*row 3: damaged"):
        load_parts(DataConfig(name="cifar10", path=str(tmp_path / "x.parquet")))


def test_data_behind_the_end_and_further_frames_are_noted() -> None:
    notes = Notes()
    several = encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(90)])
    pixels = decode(encoded(NOISE, "JPEG") + b"trailer", encoded(NOISE, "PNG") + b"x", several, notes=notes)
    assert len(pixels) == 3
    assert notes.lines() == (
        "images with data behind their end, which is ignored: 2, such as image 0",
        "images with several frames or pages, of which the first is used: 1, such as image 2",
    )


def test_an_image_of_too_many_pixels_is_refused_from_its_header() -> None:
    """A header of 13000 x 13000 pixels with data for none of them; and one above Pillow's own limit."""
    side = int(MOST_PIXELS**0.5) + 1
    for width in (side, 13_000, 60_000):
        with pytest.raises(DataError, match=f"image 0: too large .*at most {MOST_PIXELS:,} pixels are read"):
            decode(png(width, width, 8, 0, rows=b"\0"))


# Transparency


@pytest.mark.parametrize(
    ("background", "grounds"), [("white", (255, 255, 255)), ("#010203", (1, 2, 3)), ("#0a14FF", (10, 20, 255))]
)
def test_black_strokes_on_a_transparent_ground_differ(tmp_path: Path, background: str, grounds: tuple[int, ...]) -> None:
    for i in range(12):
        rgba = np.zeros((8, 8, 4), dtype=np.uint8)
        rgba[i % 8, :, 3] = 255
        rgba[:, i % 3, 3] = 255
        path = tmp_path / ("ant" if i % 2 else "bee") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rgba).save(path)
    parts = load_parts(parse_config({"data.name": "folder", "data.path": str(tmp_path), "data.background": background}).data)
    colours = {tuple(pixel) for image in parts.private.images for pixel in image.flatten(1).T.tolist()}
    assert colours == {(0, 0, 0), grounds}


@pytest.mark.parametrize("value", ["grey", "#12345", "#gggggg", "", "White "])
def test_grounds_that_are_none(value: str) -> None:
    with pytest.raises(ConfigError, match="data.background: got .*allowed: white | black | #rrggbb"):
        parse_config({"data.background": value})


def half_transparent(mode: str) -> Image.Image:
    """Black everywhere; the left half is transparent."""
    alpha = Image.fromarray(np.repeat(np.uint8([[0] * 4 + [255] * 4]), 8, axis=0))
    rgba = Image.merge("RGBA", (*Image.new("RGB", (8, 8)).split(), alpha))
    return rgba if mode == "RGBA" else rgba.convert(mode)


@pytest.mark.parametrize("content", [
    encoded(half_transparent("RGBA"), "PNG"), encoded(half_transparent("LA"), "PNG"), encoded(half_transparent("RGBA"), "TIFF"),
    encoded(half_transparent("RGBA"), "WEBP", lossless=True), encoded(half_transparent("RGBA"), "GIF"),
    encoded(half_transparent("RGBA").quantize(4), "PNG"),
    png(8, 8, 8, 0, rows=(b"\0" + bytes([7] * 4 + [0] * 4)) * 8, before=chunk(b"tRNS", b"\0\x07")),
    png(8, 8, 8, 2, rows=(b"\0" + bytes([7, 8, 9] * 4 + [0] * 12)) * 8, before=chunk(b"tRNS", b"\0\x07\0\x08\0\x09")),
    png(8, 8, 16, 0, rows=(b"\0" + b"\x12\x34" * 4 + bytes(8)) * 8, before=chunk(b"tRNS", b"\x12\x34")),
    png(8, 8, 16, 2, rows=(b"\0" + b"\x12\x34" * 12 + bytes(24)) * 8, before=chunk(b"tRNS", b"\x12\x34" * 3)),
    png(8, 8, 16, 6, rows=(b"\0" + bytes(32) + (b"\0" * 6 + b"\xff\xff") * 4) * 8),
    png(8, 8, 4, 0, rows=(b"\0\x55\x55\0\0") * 8, before=chunk(b"tRNS", b"\0\x05")),
    png(8, 8, 2, 0, rows=(b"\0\x55\0") * 8, before=chunk(b"tRNS", b"\0\x01")),
    png(8, 8, 1, 0, rows=(b"\0\xf0") * 8, before=chunk(b"tRNS", b"\0\x01")),
], ids=["RGBA", "LA", "tiff", "webp", "gif", "palette", "L+tRNS", "RGB+tRNS", "16", "RGB16", "RGBA16", "4-bit", "2-bit", "1-bit"])  # fmt: skip
def test_transparency_of_every_kind_shows_the_ground(content: bytes) -> None:
    expected = np.zeros((3, 8, 8))
    expected[:, :, :4] = np.array([200, 100, 50])[:, None, None]
    np.testing.assert_array_equal(decode(content, channels=3, background=(200, 100, 50))[0], expected)
    assert set(decode(content, background=(9, 9, 9))[0, 0].flatten().tolist()) == {0, 9}


def test_partial_transparency_is_a_mixture_and_grey_stays_grey() -> None:
    """128 of 255 of black over white is 127."""
    image = Image.merge("LA", (Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 128)))
    pixels = decode(encoded(image, "PNG"))
    assert pixels.shape == (1, 1, 8, 8) and set(pixels.flatten().tolist()) == {127}


def test_images_that_are_transparent_everywhere_are_noted() -> None:
    notes = Notes()
    decode(encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "PNG"), notes=notes)
    assert notes.lines() == ("images transparent everywhere, of which only data.background is left: 1, such as image 0",)
