"""Data sets in the forms in which they come: IDX, Python batches, folders, parquet files of the Hugging Face hub."""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import save_image, write_folder
from PIL import Image, ImageOps

from fbl_flower.config import DataConfig
from fbl_flower.data.datasets import DATASETS, DataParts, load_parts
from fbl_flower.data.examples import concatenate
from fbl_flower.data.readers import download
from fbl_flower.data.readers.decoding import decode_images
from fbl_flower.data.readers.source import ImageFormat
from fbl_flower.data.readers.tiny_imagenet_names import TINY_IMAGENET
from fbl_flower.data.sources import files_digest
from fbl_flower.errors import ConfigError, DataError

SHARED = Path(os.environ.get("FBL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
REAL_TINY = SHARED / "tiny-imagenet.parquet"
FASHION = next((p for p in (download.DEBIAN_FASHION_MNIST, SHARED / "fashion-mnist") if p.is_dir()), None)


def png(value: int, *, size: int = 8, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (size, size), (value,) * 3 if mode == "RGB" else value).save(stream, "PNG")
    return stream.getvalue()


def sizes(config: DataConfig) -> list[int]:
    parts = load_parts(config)
    return [len(p) for p in (parts.test, parts.public, parts.validation, parts.private)]


# IDX


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def write_fashion(folder: Path, *, packed: bool = True) -> Path:
    """40 training images of grey value 0 .. 39 and 10 test images of 200 .. 209; the value's last digit is the class."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in (("train", np.arange(40)), ("t10k", np.arange(200, 210))):
        images = np.broadcast_to(values[:, None, None], (len(values), 28, 28)).copy()
        images[:, 0, 27] = 255  # the upper right corner tells rows from columns
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", values % 10)):
            file = folder / f"{kind}-{name}"
            if packed:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                file.write_bytes(idx(array))
    return folder


def fashion(path: Path) -> DataConfig:
    return DataConfig(name="fashion-mnist", path=str(path), num_test=10, num_public=20, num_validation=5, num_private=-1)


@pytest.mark.parametrize(("inner", "packed"), [("", True), ("", False), ("FashionMNIST/raw", False), ("raw", True)])
def test_fashion_mnist_is_read_from_idx_files(tmp_path: Path, inner: str, packed: bool) -> None:
    write_fashion(tmp_path / inner, packed=packed)
    parts = load_parts(fashion(tmp_path))
    assert parts.info.name == "fashion-mnist" and parts.test.images.shape == (10, 1, 28, 28)
    assert sorted(parts.test.images[:, 0, 5, 5].tolist()) == list(range(200, 210))
    assert parts.test.images[:, 0, 0, 27].tolist() == [255] * 10 and parts.test.images[:, 0, 27, 0].max() < 255
    train = concatenate(parts.public, parts.validation, parts.private)
    assert sorted(train.images[:, 0, 5, 5].tolist()) == list(range(40))
    assert train.labels.tolist() == (train.images[:, 0, 5, 5] % 10).tolist()


def test_a_bad_idx_file_is_one_error_that_names_it(tmp_path: Path) -> None:
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    write_fashion(tmp_path)
    good = images.read_bytes()
    for content, message in (
        (good[: len(good) // 2], "train-images-idx3-ubyte.gz cannot be read"),
        (gzip.compress(gzip.decompress(good)[:-1]), "train-images-idx3-ubyte.gz is not a whole IDX file of bytes: 31375 bytes"),
        (gzip.compress(b"\0\0\x0d\x01" + bytes(8)), "is not a whole IDX file of bytes"),
        (gzip.compress(b"\0\0\x08\x03\0"), "is not a whole IDX file of bytes"),
        (gzip.compress(b""), "is not a whole IDX file of bytes"),
        (
            gzip.compress(idx(np.zeros((40, 9, 9)))),
            r"holds \(40, 9, 9\) and train-labels-idx1-ubyte.gz \(40,\); wanted \[N, 28, 28\]",
        ),
    ):
        images.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_parts(fashion(tmp_path))
    images.write_bytes(good)
    labels.write_bytes(gzip.compress(idx(np.arange(40) % 11)))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz has labels 0 to 10; fashion-mnist has the labels 0 to 9"):
        load_parts(fashion(tmp_path))
    labels.unlink()
    with pytest.raises(DataError, match="no file at .*/train-labels-idx1-ubyte.gz; wanted the four IDX files"):
        load_parts(fashion(tmp_path))
    with pytest.raises(DataError, match="no file at .*/none; wanted the folder with the four IDX files"):
        load_parts(fashion(tmp_path / "none"))


@pytest.mark.skipif(FASHION is None, reason="no Fashion-MNIST: Debian's package dataset-fashion-mnist has it")
def test_the_real_fashion_mnist() -> None:
    parts = load_parts(DataConfig(name="fashion-mnist", path=str(FASHION)))
    assert [len(p) for p in (parts.test, parts.public, parts.validation, parts.private)] == [10_000, 1_600, 400, 20_000]
    assert parts.test.counts(10).tolist() == [1_000] * 10 and parts.private.counts(10).tolist() == [2_000] * 10


# CIFAR


def write_cifar(folder: Path, name: str) -> Path:
    """Like `write_fashion`, in Python batches; red is the value, green 0, and blue 255 in the upper right corner."""
    inner = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    (folder / inner).mkdir(parents=True)
    groups = (
        {f"data_batch_{i + 1}": np.arange(8 * i, 8 * i + 8) for i in range(5)}
        if name == "cifar10"
        else {"train": np.arange(40)}
    )
    groups["test_batch" if name == "cifar10" else "test"] = np.arange(200, 210)
    for file, values in groups.items():
        pixels = np.zeros((len(values), 3, 32, 32), dtype=np.uint8)
        pixels[:, 0] = values[:, None, None]
        pixels[:, 2, 0, 31] = 255
        batch: dict[bytes, object] = {b"data": pixels.reshape(len(values), -1), b"filenames": [b"x.png"] * len(values)}
        if name == "cifar10":
            batch[b"labels"] = (values % 10).tolist()
        else:
            batch |= {b"fine_labels": (values % 10 * 11).tolist(), b"coarse_labels": [0] * len(values)}
        (folder / inner / file).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


@pytest.mark.parametrize(("name", "factor"), [("cifar10", 1), ("cifar100", 11)])
def test_cifar_is_read_from_its_python_batches(tmp_path: Path, name: str, factor: int) -> None:
    write_cifar(tmp_path, name)
    inner = next(tmp_path.iterdir())
    for path in (tmp_path, inner):
        config = DataConfig(name=name, path=str(path), num_test=10, num_public=20, num_validation=5)
        parts = load_parts(config)
        assert parts.test.images.shape == (10, 3, 32, 32)
        train = concatenate(parts.public, parts.validation, parts.private)
        assert sorted(train.images[:, 0, 3, 3].tolist()) == list(range(40))
        assert train.labels.tolist() == (train.images[:, 0, 3, 3].long() % 10 * factor).tolist()
        assert (
            train.images[:, 1].max() == 0 and (train.images[:, 2, 0, 31] == 255).all() and train.images[:, 2, 31, 0].max() == 0
        )
    assert DATASETS["cifar100"].class_names[11] == "boy" and DATASETS["cifar100"].class_names[99] == "worm"


class Program:
    """What a pickle from somewhere may do."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("pickled-program-was-here",)


def test_a_pickled_program_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path, "cifar100")
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps({b"data": Program()}, protocol=2))
    with pytest.raises(DataError, match=r"train is not a whole batch of cifar100: it asks for (posix|nt).mkdir"):
        load_parts(DataConfig(name="cifar100", path=str(tmp_path)))
    assert not (tmp_path / "pickled-program-was-here").exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8)}, "not a whole batch"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1]}, r"not a whole batch .* labels \(1,\)"),
        ({b"data": np.zeros((2, 3072), np.float32), b"fine_labels": [1, 2]}, "not a whole batch .*float32"),
        ({b"data": np.zeros((2, 99), np.uint8), b"fine_labels": [1, 2]}, "not a whole batch"),
        (
            {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 100]},
            "has labels 1 to 100; cifar100 has the labels 0 to 99",
        ),
        ([], "not a whole batch"),
    ],
)
def test_a_bad_batch_of_cifar(tmp_path: Path, batch: object, message: str) -> None:
    write_cifar(tmp_path, "cifar100")
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match=message):
        load_parts(DataConfig(name="cifar100", path=str(tmp_path)))


def test_truncated_and_missing_batches_of_cifar(tmp_path: Path) -> None:
    file = write_cifar(tmp_path, "cifar10") / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataError, match="data_batch_3 is not a whole batch of cifar10"):
        load_parts(DataConfig(name="cifar10", path=str(tmp_path)))
    file.unlink()
    with pytest.raises(DataError, match="no file at .*/data_batch_3; wanted parquet files, or the folder cifar-10-batches-py"):
        load_parts(DataConfig(name="cifar10", path=str(tmp_path)))


# Downloads


def test_without_network_the_error_says_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def refused(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(download, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    for name, kind, way in (
        ("cifar10", "CIFAR10", "give the folder cifar-10-batches-py or parquet files"),
        ("cifar100", "CIFAR100", "give the folder cifar-100-python or parquet files"),
        ("eurosat", "EuroSAT", "give the folder with the ten class directories"),
        ("fashion-mnist", "FashionMNIST", "install Debian's package dataset-fashion-mnist, or give the folder"),
    ):
        monkeypatch.setattr(torchvision.datasets, kind, refused)
        with pytest.raises(DataError, match=f"data.path: empty, and {name} cannot be downloaded .*no route.*{way}"):
            load_parts(DataConfig(name=name))
    assert list((tmp_path / ".fbl" / "data").iterdir()) == []


def test_a_download_appears_whole_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    calls = []

    def fetch(folder: str, *, download: bool) -> None:
        calls.append(folder)
        assert download and not (tmp_path / ".fbl" / "data" / "cifar100").exists()
        write_cifar(Path(folder), "cifar100")
        (Path(folder) / "cifar-100-python.tar.gz").write_bytes(b"packed")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fetch)
    config = DataConfig(name="cifar100", num_test=10, num_public=20, num_validation=5)
    assert sizes(config) == sizes(config) == [10, 15, 5, 20]
    assert len(calls) == 1
    left = sorted(p.name for p in (tmp_path / ".fbl" / "data").rglob("*"))
    assert left == ["cifar-100-python", "cifar100", "test", "train"]


def test_debians_folder_comes_before_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "DEBIAN_FASHION_MNIST", write_fashion(tmp_path))
    assert sizes(DataConfig(name="fashion-mnist", num_test=10, num_public=20, num_validation=5)) == [10, 15, 5, 20]


# Folders


def folder(path: Path, **settings: object) -> DataConfig:
    return DataConfig(name="folder", path=str(path), **settings)  # type: ignore[arg-type]


def test_a_folder_is_cut_by_shares_and_every_class_is_in_every_part(tmp_path: Path) -> None:
    """40 images: 8 test, 4 public with 1 validation, 28 private."""
    write_folder(tmp_path, {"ant": 20, "bee": 20})
    parts = load_parts(folder(tmp_path))
    assert parts.info.class_names == ("ant", "bee") and parts.info.image_size == 8 and parts.info.channels == 3
    assert sizes(folder(tmp_path)) == [8, 3, 1, 28]
    assert parts.test.counts(2).tolist() == [4, 4] and parts.private.counts(2).tolist() == [14, 14]
    every = concatenate(parts.test, parts.public, parts.validation, parts.private)
    assert sorted(every.images[:, 0, 0, 0].tolist()) == list(range(40))
    assert every.labels.tolist() == (every.images[:, 1, 0, 0] // 10).tolist()


def test_a_small_class_of_a_folder_is_in_every_part(tmp_path: Path) -> None:
    """Of 60 and 20 images, 16 are test images and 8 public, 2 of these for validation: of the smaller class a quarter of each.

    The cut goes by place within the class, (rank + 1/2) / size: the small class's are at 1/40, 3/40, 5/40, 7/40, ...
    """
    write_folder(tmp_path, {"ant": 60, "bee": 20})
    parts = load_parts(folder(tmp_path))
    found = [part.counts(2).tolist() for part in (parts.test, parts.public, parts.validation, parts.private)]
    assert [sum(counts) for counts in found] == [16, 6, 2, 56]
    assert found[0] == [12, 4] and found[3] == [42, 14]
    assert all(abs(few - sum((many, few)) / 4) < 1 for many, few in found)


def test_a_class_is_one_however_its_accents_are_spelled(tmp_path: Path) -> None:
    """As in archives of macOS, where the accent is a character of its own."""
    composed, apart = "\u00c4pfel", "A\u0308pfel"
    write_folder(tmp_path / "train", {composed: 4, "Birnen": 4})
    write_folder(tmp_path / "test", {apart: 2, "Birnen": 2}, first=100)
    parts = load_parts(folder(tmp_path, num_public=0))
    assert parts.info.class_names == ("Birnen", composed)
    assert parts.test.counts(2).tolist() == [2, 2] and parts.private.counts(2).tolist() == [4, 4]
    for names in (f"{apart},Birnen", f"{composed},Birnen"):
        assert load_parts(folder(tmp_path, classes=names, num_public=0)).info.class_names == (composed, "Birnen")
    text = {"image": [png(i) for i in range(8)], "label": [composed, "Birnen"] * 4}
    pyarrow.parquet.write_table(pyarrow.table(text), tmp_path / "text.parquet")
    parts = load_parts(parquet(tmp_path / "text.parquet", classes=f"{apart},Birnen", num_test=2, num_public=0))
    assert parts.private.counts(2).tolist() == [3, 3]


def test_links_are_followed_and_those_that_lead_nowhere_are_passed_over(tmp_path: Path) -> None:
    elsewhere, place = write_folder(tmp_path / "elsewhere", {"ant": 8, "bee": 8}), tmp_path / "links"
    place.mkdir()
    for name in ("ant", "bee"):
        (place / name).symlink_to(elsewhere / name)
    (place / ".#notes.txt").symlink_to("nowhere")  # as Emacs locks a file
    (elsewhere / "ant" / "gone.txt").symlink_to("nowhere")
    (elsewhere / "ant" / ".up").symlink_to(elsewhere)  # a walk must not go round in it
    before = files_digest(str(place))
    assert sum(sizes(folder(place))) == 16 and files_digest(str(place)) == before
    save_image(elsewhere / "bee" / "new.png", (255, 10, 0))
    assert sum(sizes(folder(place))) == 17 and files_digest(str(place)) != before
    hugging_face(tmp_path / "shards" / "train.parquet", list(range(10)), [0, 1] * 5, ["even", "odd"])
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "data").symlink_to(tmp_path / "shards")
    (tmp_path / "linked" / "data" / "._train.parquet").write_bytes(b"what macOS keeps of a file")
    assert sum(sizes(parquet(tmp_path / "linked"))) == 10


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is closed to the superuser")
def test_a_class_directory_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 8, "bee": 8})
    (tmp_path / "bee").chmod(0)
    with pytest.raises(DataError, match=r"data.path: .*bee cannot be read \(Permission denied\); mend its permissions"):
        load_parts(folder(tmp_path))


def test_grey_images_of_16_bits_are_scaled_and_others_of_more_bits_refused(tmp_path: Path) -> None:
    """65535 is white, 257 x 100 is 100 of 255; 32 bits have no white that is known."""
    write_folder(tmp_path, {"ant": 8, "bee": 8})
    for suffix in ("png", "tif"):
        Image.fromarray(np.array([[0, 25700], [60000, 65535]], dtype=np.uint16).repeat(4, 0).repeat(4, 1)).save(
            tmp_path / "ant" / f"deep.{suffix}"
        )
    pixels = np.array([[0, 392], [914, 1000]], dtype=">u2").repeat(4, 0).repeat(4, 1)  # white is what its head says
    (tmp_path / "ant" / "deep.pgm").write_bytes(b"P5 8 8 1000\n" + pixels.tobytes())
    parts = load_parts(folder(tmp_path, num_test=1, num_public=0))
    images = torch.cat([parts.test.images, parts.private.images])
    deep = [image for image in images if image[0, 7, 7] == 255]
    assert len(deep) == 3 and all(image[:, ::4, ::4].tolist() == [[[0, 100], [233, 255]]] * 3 for image in deep)
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "ant" / "float.tif")
    with pytest.raises(
        DataError, match=r"float.tif: damaged image \(ValueError: Pillow's mode F, 32 bits a pixel; wanted 8 or 16 bits\)"
    ):
        load_parts(folder(tmp_path))


def test_labels_follow_the_federations_list_and_not_the_folders_listing(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 10, "cat": 10})
    parts = load_parts(folder(tmp_path, classes="cat, bee ,ant"))
    assert parts.info.class_names == ("cat", "bee", "ant")
    assert parts.private.counts(3)[1] == 0
    assert set(zip(parts.private.images[:, 1, 0, 0].tolist(), parts.private.labels.tolist(), strict=True)) == {(0, 2), (10, 0)}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    """A client that has images of that class alone, and one whose folder has it as its only split."""
    write_folder(tmp_path / "class", {"train": 10})
    write_folder(tmp_path / "split" / "train", {"train": 10})
    for name in ("class", "split"):
        parts = load_parts(folder(tmp_path / name, classes="bus, train"))
        assert parts.info.class_names == ("bus", "train") and set(parts.private.labels.tolist()) == {1}


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_with_a_test_split_of_its_own(tmp_path: Path, held_out: str) -> None:
    write_folder(tmp_path / "train", {"ant": 10, "bee": 10})
    write_folder(tmp_path / held_out, {"bee": 3}, first=100)
    parts = load_parts(folder(tmp_path))
    assert sizes(folder(tmp_path)) == [3, 2, 0, 18]
    assert sorted(parts.test.images[:, 0, 0, 0].tolist()) == [100, 101, 102] and parts.test.labels.tolist() == [1, 1, 1]


def test_images_of_different_sizes_need_one(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 10, "bee": 10})
    save_image(tmp_path / "bee" / "wide.jpg", 90, size=(30, 12))
    with pytest.raises(
        DataError, match=r"data.image-size: 0, and the images differ: .*wide.jpg has 30 x 12 pixels, and .*000.png 8 x 8"
    ):
        load_parts(folder(tmp_path))
    parts = load_parts(folder(tmp_path, image_size=16))
    assert parts.private.images.shape[1:] == (3, 16, 16) and parts.image_size == 16 and parts.info.shift == 2


def test_an_oblong_image_is_cropped_in_the_middle_and_turned_upright(tmp_path: Path) -> None:
    """16 x 8 pixels: black on the left and white on the right four columns are cut off, or, turned, the rows."""
    pixels = np.full((8, 16, 3), 100, dtype=np.uint8)
    pixels[:, :4], pixels[:, 12:] = 0, 255
    write_folder(tmp_path, {"ant": 9, "bee": 10})
    Image.fromarray(pixels).save(tmp_path / "ant" / "wide.png")
    assert (load_parts(folder(tmp_path, image_size=8)).info.image_size) == 8
    sideways = np.zeros((8, 8, 3), dtype=np.uint8)
    sideways[0] = 255  # the upper edge; orientation 6 says: turn clockwise, so that it is the right one
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(sideways).save(tmp_path / "ant" / "turned.png", exif=exif)
    parts = load_parts(folder(tmp_path, image_size=8, num_test=1, num_public=0))
    images = torch.cat([parts.test.images, parts.private.images])
    assert (images == 100).flatten(1).all(1).sum() == 1
    turned = [image for image in images if image[0, :, 7].min() == 255 and image[0, :, :7].max() == 0]
    assert len(turned) == 1


@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_every_orientation_is_turned_as_pillow_does(orientation: int | None) -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    wanted = ImageFormat(name="folder", class_names=None, channels=1, upright=True, size=6)
    pixels = decode_images([stream.getvalue()], wanted, str).pixels[0, 0]
    with Image.open(stream) as opened:
        turned = ImageOps.fit(ImageOps.exif_transpose(opened), (6, 6), method=Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pixels, np.asarray(turned))


@pytest.mark.parametrize("tag", [0x0128, 0x0213, 0x0100, 0x011A])  # ResolutionUnit, YCbCrPositioning, ImageWidth, XResolution
def test_a_tag_of_a_wrong_type_beside_the_orientation_does_no_harm(tag: int) -> None:
    """An IFD of two entries, in order of their tags: orientation 6 as a short, and the other as text, which Pillow cannot write again."""
    entries = sorted([(0x0112, struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)), (tag, struct.pack("<HHI4s", tag, 2, 4, b"abc\0"))])
    ifd = struct.pack("<H", 2) + b"".join(entry for _, entry in entries) + struct.pack("<I", 0)
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:4] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0" + ifd)
    wanted = ImageFormat(name="folder", class_names=None, channels=1, upright=True)
    np.testing.assert_array_equal(decode_images([stream.getvalue()], wanted, str).pixels[0, 0], np.rot90(pixels, -1))


def test_grey_palette_and_transparent_images_become_colour_or_all_grey(tmp_path: Path) -> None:
    for i, mode in enumerate(("L", "1", "P", "RGBA", "LA")):
        save_image(tmp_path / "ant" / f"{i}.png", 0, mode=mode)
    write_folder(tmp_path, {"bee": 5})
    assert load_parts(folder(tmp_path)).private.images.shape[1] == 3
    assert load_parts(folder(tmp_path, channels=1)).private.images.shape[1] == 1


def test_bad_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "ok", {"ant": 3, "bee": 3})
    (tmp_path / "ok" / "bee" / "notes.txt").write_text("no image")
    (tmp_path / "ok" / ".hidden").mkdir()
    assert sum(sizes(folder(tmp_path / "ok"))) == 6
    with pytest.raises(
        DataError, match=r"the directory .*/ok/bee is none of the classes ant, cat; add it to data.classes or move it"
    ):
        load_parts(folder(tmp_path / "ok", classes="ant,cat"))
    (tmp_path / "ok" / "__MACOSX").mkdir()
    save_image(tmp_path / "ok" / "bee" / "young" / "queens" / "1.png", 0)
    with pytest.raises(DataError, match=r"images in .*/ok/bee/young; wanted those of the class bee directly in .*/ok/bee$"):
        load_parts(folder(tmp_path / "ok"))
    shutil.rmtree(tmp_path / "ok" / "bee" / "young")
    assert load_parts(folder(tmp_path / "ok")).info.class_names == ("ant", "bee")
    save_image(tmp_path / "flat" / "1.png", 0)
    with pytest.raises(DataError, match="flat has no class directories; wanted .*flat/CLASS/IMAGE.png"):
        load_parts(folder(tmp_path / "flat"))
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in the class directories of .*/empty"):
        load_parts(folder(tmp_path / "empty"))
    with pytest.raises(DataError, match="no file at .*/none; wanted a folder with a directory of images for each class"):
        load_parts(folder(tmp_path / "none"))
    with pytest.raises(DataError, match="no folder at .*1.png; wanted a folder of images"):
        load_parts(folder(tmp_path / "flat" / "1.png"))
    good = (tmp_path / "ok" / "ant" / "001.png").read_bytes()
    for damaged, problem in ((b"", "not an image"), (b"no image", "not an image"), (good[:45], "damaged image")):
        (tmp_path / "ok" / "ant" / "001.png").write_bytes(damaged)
        os.utime(tmp_path / "ok" / "ant", ns=(1, len(damaged)))
        with pytest.raises(DataError, match=f"ok/ant/001.png: {problem}"):
            load_parts(folder(tmp_path / "ok"))
    write_folder(tmp_path / "one", {"ant": 1})
    with pytest.raises(ConfigError, match="needs at least one test image"):
        load_parts(folder(tmp_path / "one"))
    write_folder(tmp_path / "split" / "train", {"ant": 3})
    write_folder(tmp_path / "split" / "val", {"ant": 3})
    (tmp_path / "split" / "test" / "ant").mkdir(parents=True)
    with pytest.raises(
        DataError, match="no images in .*/split/test, the test split of .*/split/train; wanted .*, or remove the folder"
    ):
        load_parts(folder(tmp_path / "split"))
    with pytest.raises(DataError, match="data.path: .*/aaa+ cannot be read \\(File name too long\\); correct it"):
        load_parts(folder(tmp_path / ("a" * 300)))


# EuroSAT and Tiny-ImageNet


@pytest.mark.parametrize("inner", ["", "2750", "eurosat/2750"])
def test_eurosat_is_read_from_its_class_directories(tmp_path: Path, inner: str) -> None:
    for label, name in enumerate(DATASETS["eurosat"].class_names):
        for i in range(10):
            save_image(tmp_path / inner / name / f"{name}_{i}.png", (10 + 20 * label, i, 0), size=(64, 64))
    config = DataConfig(name="eurosat", path=str(tmp_path))
    assert sizes(config) == [10, 8, 2, 80]
    parts = load_parts(config)
    assert parts.private.counts(10).tolist() == [8] * 10
    assert parts.private.images[:, 0, 9, 9].sub(10).div(20).round().long().tolist() == parts.private.labels.tolist()
    save_image(tmp_path / inner / "River" / "River_0.png", 1, size=(32, 64))
    os.utime(tmp_path / inner / "River", ns=(1, 1))
    with pytest.raises(DataError, match="River_0.png: 32 x 64 pixels; eurosat has 64 x 64"):
        load_parts(config)


def striped(path: Path, value: int, *, stripe: int, mode: str = "RGB") -> None:
    """Write an image of one grey value, with another in its uppermost rows."""
    pixels = np.full((64, 64), value, dtype=np.uint8)
    pixels[:8] = stripe
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def write_tiny(root: Path) -> Path:
    """Four classes of the 200, with 10 training images each and one for validation."""
    lines = []
    for place, label in enumerate((0, 7, 100, 199)):
        wnid = list(TINY_IMAGENET)[label]
        for i in range(10):
            striped(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", label, stripe=20 * i, mode="L" if i == 3 else "RGB")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x\t0\t0\t1\t1\n")
        striped(root / "val" / "images" / f"val_{place}.JPEG", label, stripe=250)
        lines.append(f"val_{place}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def test_tiny_imagenet_is_read_from_its_folder(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny-imagenet-200")
    parts = load_parts(DataConfig(name="tiny-imagenet", path=str(tmp_path)))
    assert [len(p) for p in (parts.test, parts.public, parts.validation, parts.private)] == [4, 3, 1, 36]
    assert parts.info.class_names[:2] == ("goldfish", "European fire salamander") and parts.info.num_classes == 200
    assert sorted(parts.test.labels.tolist()) == [0, 7, 100, 199]
    everything = concatenate(parts.test, parts.private)
    assert (everything.images[:, 0, 32, 32].long() - everything.labels).abs().max() <= 2  # JPEG
    assert list(TINY_IMAGENET) == sorted(TINY_IMAGENET) and len(TINY_IMAGENET) == 200


def test_a_bad_tiny_imagenet_folder(tmp_path: Path) -> None:
    config = DataConfig(name="tiny-imagenet", path=str(write_tiny(tmp_path)))
    annotations = tmp_path / "val" / "val_annotations.txt"
    good = annotations.read_text()
    annotations.write_text(good + "val_9.JPEG\tn00000000\t0\n")
    with pytest.raises(
        DataError, match="val_annotations.txt, line 5: got 'val_9.JPEG.tn00000000.t0'; wanted a file and one of the 200"
    ):
        load_parts(config)
    annotations.write_text(good + f"val_9.JPEG\t{next(iter(TINY_IMAGENET))}\n")
    with pytest.raises(DataError, match=r"val_9.JPEG: not an image that can be read \(No such file"):
        load_parts(config)
    annotations.unlink()
    with pytest.raises(DataError, match="no file at .*val_annotations.txt, and no folders val/WNID; wanted the folder"):
        load_parts(config)
    annotations.write_text(good)
    (tmp_path / "train" / "cat" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match="train/cat is none of Tiny-ImageNet's 200 classes"):
        load_parts(config)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_TINY.is_file(), reason=f"no Tiny-ImageNet at {REAL_TINY}; FBL_SHARED_DATA names its folder")
def test_the_real_part_of_tiny_imagenet() -> None:
    """40 training and 10 test images of each class: 800 public ones are 4 of each, 3 of them to train on."""
    parts = load_parts(DataConfig(name="tiny-imagenet", path=str(REAL_TINY)))
    assert [len(p) for p in (parts.test, parts.public, parts.validation, parts.private)] == [2_000, 600, 200, 7_200]
    assert parts.public.counts(200).tolist() == [3] * 200 and parts.private.counts(200).tolist() == [36] * 200
    assert parts.private.images.shape[1:] == (3, 64, 64)


# Parquet files of any data set


def hugging_face(
    path: Path, values: list[int], labels: list[int], names: list[str] | None, *, image: str = "image", label: str = "label"
) -> Path:
    """Write a file as the library `datasets` does: images as structs of bytes and path, class names in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [{"bytes": png(value), "path": f"{value}.png"} for value in values]
    table = pyarrow.table({image: structs, label: pyarrow.array(labels, pyarrow.int64())})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path)
    return path


def parquet(path: Path, **settings: object) -> DataConfig:
    return DataConfig(name="parquet", path=str(path), **settings)  # type: ignore[arg-type]


def write_hub(root: Path, names: list[str] | None, **columns: str) -> Path:
    """Two training files of 10 images and a test file of 4, in the folder data, as on the hub."""
    for i in range(2):
        values = list(range(10 * i, 10 * i + 10))
        hugging_face(root / "data" / f"train-0000{i}-of-00002.parquet", values, [v % 2 for v in values], names, **columns)
    hugging_face(root / "data" / "test-00000-of-00001.parquet", [200, 201, 202, 203], [0, 1, 0, 1], names, **columns)
    return root


@pytest.mark.parametrize("columns", [{}, {"image": "img", "label": "fine_label"}, {"image": "leaf", "label": "disease"}])
def test_files_of_the_hub_are_read_with_their_class_names(tmp_path: Path, columns: dict[str, str]) -> None:
    write_hub(tmp_path, ["even", "odd"], **columns)
    parts = load_parts(parquet(tmp_path))
    assert parts.info.class_names == ("even", "odd") and parts.info.channels == 3 and parts.image_size == 8
    assert sizes(parquet(tmp_path)) == [4, 2, 0, 18]
    assert sorted(parts.test.images[:, 0, 0, 0].tolist()) == [200, 201, 202, 203]
    every = concatenate(parts.public, parts.private)
    assert sorted(every.images[:, 0, 0, 0].tolist()) == list(range(20))
    assert every.labels.tolist() == (every.images[:, 0, 0, 0] % 2).tolist()


class Hub:
    """Stands for the hub: data sets as folders of this machine, one for each of their states."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, states: dict[str | None, Path]) -> None:
        import huggingface_hub

        self.states, self.fetched = states, list[list[str]]()
        monkeypatch.setattr(
            huggingface_hub.HfApi, "list_repo_files", lambda _, name, repo_type, revision: self.files(name, revision)
        )
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.fetch)

    def files(self, name: str, revision: str | None) -> list[str]:
        assert name == "somebody/leaves"
        root = self.states[revision]
        return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]

    def fetch(self, name: str, *, repo_type: str, revision: str | None, allow_patterns: list[str], local_dir: str) -> None:
        assert repo_type == "dataset" and name == "somebody/leaves"
        self.fetched.append(allow_patterns)
        for file in allow_patterns:
            target = Path(local_dir, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.states[revision] / file, target)
        Path(local_dir, ".cache", "huggingface").mkdir(parents=True)


def test_a_data_set_of_the_hub_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (write_hub(tmp_path / "repo", ["even", "odd"]) / "README.md").write_text("no data")
    hub = Hub(monkeypatch, {None: tmp_path / "repo"})
    config = DataConfig(name="parquet", path="hf://datasets/somebody/leaves")
    assert sizes(config) == sizes(config) == [4, 2, 0, 18]
    assert load_parts(config).info.class_names == ("even", "odd")
    assert [len(files) for files in hub.fetched] == [3]
    place = tmp_path / "home" / ".fbl" / "data" / "hub" / "somebody--leaves"
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert sorted(path.name for path in place.iterdir()) == ["data"]


def test_a_data_sets_own_folders_may_be_configurations_or_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The train split of one configuration can have the test images of another: they are never read together."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    places = ("own/full/train", "own/full/test", "own/small/train-00000", "own/small/test-00000", "plain/train", "plain/test")
    for first, place in enumerate((*places, "split/train/0", "split/test/0")):
        hugging_face(tmp_path / f"{place}.parquet", list(range(20 * first, 20 * first + 10)), [0, 1] * 5, ["even", "odd"])

    def load(folder: str) -> DataParts:
        Hub(monkeypatch, {None: tmp_path, "v1": tmp_path / "own"})
        return load_parts(DataConfig(name="parquet", path=f"hf://datasets/somebody/leaves{folder}"))

    for url, one in (("/own", "/own/full"), ("@v1", "@v1/full"), ("", "/own")):
        with pytest.raises(
            DataError, match=f"several configurations: .*; choose one, such as hf://datasets/somebody/leaves{one}$"
        ):
            load(url)
    for url in ("/own/small", "@v1/full", "/split", "/plain"):
        assert len(load(url).test) == 10
    with pytest.raises(
        DataError, match=f"several configurations: full, small; .* choose one, such as {tmp_path / 'own' / 'full'}, or"
    ):
        load_parts(parquet(tmp_path / "own"))  # as a copy of the repository has them
    for place in ("own/full", "split", "plain"):
        assert len(load_parts(parquet(tmp_path / place)).test) == 10


def test_revisions_with_a_slash_and_folders_of_their_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for state, values in (("main", [1]), ("tag", [2]), ("converted", [3])):
        for place in ("data", "v2"):
            images = list(range(20 * values[0], 20 * values[0] + 10))
            hugging_face(tmp_path / state / place / "train.parquet", images, [0, 1] * 5, ["even", "odd"])
    Hub(monkeypatch, {None: tmp_path / "main", "v2": tmp_path / "tag", "refs/convert/parquet": tmp_path / "converted"})
    for url, value in (("@refs/convert/parquet/data", 3), ("@v2/data", 2), ("/v2", 1), ("@v2/v2", 2)):
        parts = load_parts(DataConfig(name="parquet", path=f"hf://datasets/somebody/leaves{url}", num_public=0))
        assert parts.private.images.div(20, rounding_mode="floor").unique().tolist() == [value]


def test_other_formats_are_taken_from_the_hubs_own_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "images.zip").write_bytes(b"")
    for kind, value in (("large", 100), ("small", 50)):
        for first, split in ((value, "train"), (value + 20, "test")):
            images = list(range(first, first + 10))
            hugging_face(tmp_path / "converted" / kind / split / "0000.parquet", images, [0, 1] * 5, ["even", "odd"])
    hub = Hub(monkeypatch, {None: tmp_path / "main", "refs/convert/parquet": tmp_path / "converted", "abc": tmp_path / "main"})

    def load(url: str) -> DataParts:
        return load_parts(DataConfig(name="parquet", path=url))

    with pytest.raises(
        DataError, match=r"several configurations: large, small; choose one, such as hf://datasets/somebody/leaves/large"
    ):
        load("hf://datasets/somebody/leaves")
    parts = load("hf://datasets/somebody/leaves/small")
    assert set(parts.test.images.flatten().tolist()) == set(range(70, 80)) and len(parts.test) == 10
    assert hub.fetched == [["small/test/0000.parquet", "small/train/0000.parquet"]]
    with pytest.raises(DataError, match=r"somebody/leaves has no parquet files on the hub"):
        load("hf://datasets/somebody/leaves@abc")
    with pytest.raises(DataError, match=r"somebody/leaves has no parquet files in none on the hub"):
        load("hf://datasets/somebody/leaves/none")


@pytest.mark.parametrize(
    "url", ["hf://somebody/leaves", "hf://datasets/leaves", "hf://datasets/a/b c", "hf://datasets/a/b/../../c/d"]
)
def test_names_that_the_hub_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"wanted hf://datasets/OWNER/NAME"):
        load_parts(DataConfig(name="parquet", path=url))


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_without_network_is_one_clear_error(tmp_path: Path, offline: str) -> None:
    command = "from fbl_flower.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    settings = "data.name='parquet' data.path='hf://datasets/somebody/leaves' generator.name='public-images'"
    done = subprocess.run(
        [sys.executable, "-c", command, "data", "plot", "-c", settings, "--out", str(tmp_path / "x.png")],
        env=os.environ | {"HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "hf://datasets/somebody/leaves cannot be downloaded" in done.stderr and "give their folder" in done.stderr
    assert not list(tmp_path.rglob("*.parquet"))


def test_the_federations_class_list_renumbers_the_hubs(tmp_path: Path) -> None:
    """The file says 0: even, 1: odd; the federation says 0: odd, 1: zero, 2: even."""
    write_hub(tmp_path, ["even", "odd"])
    parts = load_parts(parquet(tmp_path, classes="odd,zero,even"))
    assert parts.test.labels.tolist() == [0 if value % 2 else 2 for value in parts.test.images[:, 0, 0, 0].tolist()]
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet has the label 'odd'; the classes are even, three"):
        load_parts(parquet(tmp_path, classes="even,three"))


def test_classes_without_names_are_numbered_and_labels_may_be_text(tmp_path: Path) -> None:
    write_hub(tmp_path / "numbers", None)
    assert load_parts(parquet(tmp_path / "numbers")).info.class_names == ("class 0", "class 1")
    assert load_parts(parquet(tmp_path / "numbers", classes="a,b")).info.class_names == ("a", "b")
    with pytest.raises(DataError, match="has labels 0 to 1; parquet has the labels 0 to 0"):
        load_parts(parquet(tmp_path / "numbers", classes="a"))
    text = tmp_path / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [png(i) for i in range(20)], "label": ["ant", "bee"] * 10}), text)
    with pytest.raises(DataError, match="data.classes: empty, and the labels of .*text.parquet are text"):
        load_parts(parquet(text))
    categories = pyarrow.array(["ant", "bee"] * 10).dictionary_encode()
    table = pyarrow.table({"image": [png(i) for i in range(20)], "label": categories})
    pyarrow.parquet.write_table(table, tmp_path / "categories.parquet")
    assert sizes(parquet(tmp_path / "categories.parquet", classes="bee,ant")) == [4, 2, 0, 14]
    parts = load_parts(parquet(text, classes="bee,ant"))
    assert sizes(parquet(text, classes="bee,ant")) == [4, 2, 0, 14]  # no split: a fifth is the test part
    assert parts.private.labels.tolist() == [1 - value % 2 for value in parts.private.images[:, 0, 0, 0].tolist()]


def test_grey_images_stay_grey_and_a_mixture_is_colour(tmp_path: Path) -> None:
    table = {"image": [png(i, mode="L") for i in range(20)], "label": [0, 1] * 10}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "grey.parquet")
    assert load_parts(parquet(tmp_path / "grey.parquet")).info.channels == 1
    table["image"][11] = png(11)
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "mixed.parquet")
    mixed = load_parts(parquet(tmp_path / "mixed.parquet"))
    assert mixed.info.channels == 3 and torch.equal(mixed.private.images[:, 0], mixed.private.images[:, 2])


def test_validation_is_the_test_split_where_there_is_no_other(tmp_path: Path) -> None:
    values = list(range(20))
    hugging_face(tmp_path / "train-0.parquet", values, [v % 2 for v in values], None)
    hugging_face(tmp_path / "validation-0.parquet", [100, 101], [0, 1], None)
    assert sorted(load_parts(parquet(tmp_path)).test.images[:, 0, 0, 0].tolist()) == [100, 101]
    hugging_face(tmp_path / "test-0.parquet", [200, 201, 202], [0, 1, 1], None)
    parts = load_parts(parquet(tmp_path))
    assert sorted(parts.test.images[:, 0, 0, 0].tolist()) == [200, 201, 202]
    assert sizes(parquet(tmp_path)) == [3, 2, 0, 18]


def test_folders_may_name_the_splits(tmp_path: Path) -> None:
    """As the hub's own conversion to parquet does."""
    hugging_face(tmp_path / "default" / "train" / "0000.parquet", list(range(20)), [v % 2 for v in range(20)], None)
    hugging_face(tmp_path / "default" / "test" / "0000.parquet", [100, 101], [0, 1], None)
    assert sorted(load_parts(parquet(tmp_path)).test.images[:, 0, 0, 0].tolist()) == [100, 101]


@pytest.mark.parametrize("name", ["digits-test", "Test", "testing_1", "test/a/0", "split=test/0", "d.TEST.v2"])
def test_a_word_in_a_name_is_the_split(tmp_path: Path, name: str) -> None:
    """`latest` is no such word."""
    hugging_face(tmp_path / "latest" / "train.parquet", list(range(20)), [v % 2 for v in range(20)], None)
    hugging_face(tmp_path / f"{name}.parquet", [100, 101], [0, 1], None)
    assert sorted(load_parts(parquet(tmp_path)).test.images[:, 0, 0, 0].tolist()) == [100, 101]


def test_an_empty_file_beside_others_holds_no_images(tmp_path: Path) -> None:
    hugging_face(tmp_path / "train-0.parquet", list(range(20)), [v % 2 for v in range(20)], ["a", "b"])
    empty = pyarrow.parquet.read_table(tmp_path / "train-0.parquet").slice(0, 0)
    pyarrow.parquet.write_table(empty, tmp_path / "train-1.parquet")
    assert sum(sizes(parquet(tmp_path, classes="b,a"))) == 20


def test_bad_parquet_data_sets(tmp_path: Path) -> None:
    hugging_face(tmp_path / "both" / "train-test.parquet", [1, 2], [0, 1], None)
    with pytest.raises(DataError, match=r"the name 'train-test' says test and train; rename it, or add a column split"):
        load_parts(parquet(tmp_path / "both"))
    hugging_face(tmp_path / "from-one.parquet", [1, 2], [1, 2], None)
    with pytest.raises(DataError, match="has labels from 1 on; without data.classes, classes are numbered from 0"):
        load_parts(parquet(tmp_path / "from-one.parquet"))
    hugging_face(tmp_path / "other.parquet", [1, 2], [0, 1], None, image="picture", label="kind")
    with pytest.raises(DataError, match="has the columns picture, kind, and none called image or label; rename yours"):
        load_parts(parquet(tmp_path / "other.parquet"))
    write_hub(tmp_path / "cut", ["even", "odd"])
    file = tmp_path / "cut" / "data" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet is cut off: the end of the parquet file is missing"):
        load_parts(parquet(tmp_path / "cut"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file \*.parquet in .*/empty"):
        load_parts(parquet(tmp_path / "empty"))
    table = pyarrow.table({"image": [{"path": "1.png"}], "label": [0]})
    pyarrow.parquet.write_table(table, tmp_path / "paths.parquet")
    with pytest.raises(DataError, match="paths.parquet, column image: holds paths, not images"):
        load_parts(parquet(tmp_path / "paths.parquet"))
    hugging_face(tmp_path / "far.parquet", [1, 2], [0, 10**15], None)
    with pytest.raises(DataError, match="has labels up to 1000000000000000; without data.classes, at most 9999"):
        load_parts(parquet(tmp_path / "far.parquet"))
    hugging_face(tmp_path / "negative.parquet", [1, 2], [0, -1], None)
    with pytest.raises(DataError, match="has labels from -1 on; without data.classes, classes are numbered from 0"):
        load_parts(parquet(tmp_path / "negative.parquet"))
    hugging_face(tmp_path / "test-only" / "test-0.parquet", [1], [0], None)
    with pytest.raises(DataError, match="no rows with split 'train'"):
        load_parts(parquet(tmp_path / "test-only"))
    with pytest.raises(DataError, match="no rows with split 'test'; wanted train and test"):
        load_parts(DataConfig(name="cifar10", path=str(write_train_only(tmp_path / "train-only"))))


def write_train_only(root: Path) -> Path:
    for i in range(2):
        hugging_face(root / f"train-{i}.parquet", [1, 2], [0, 1], None)
    return root
