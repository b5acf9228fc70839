"""Examples, batches, and data sets cut into disjoint parts."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from fbl_flower.config import DataConfig
from fbl_flower.data.batches import antialiased, augment, batch_indices, to_float
from fbl_flower.data.datasets import DATASETS, DataParts, load_parts
from fbl_flower.data.examples import Examples, concatenate
from fbl_flower.errors import ConfigError, DataError
from fbl_flower.seeding import torch_stream

BUNDLED = Path(__file__).parents[1] / "fbl_generators"
REAL_CIFAR10 = Path(os.environ.get("FBL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cifar10-png.parquet"
REAL_FASHION = Path("/usr/share/datasets/fashion-mnist")


def examples_of(*labels: int, size: int = 2) -> Examples:
    images = torch.arange(len(labels) * size * size, dtype=torch.uint8).view(len(labels), 1, size, size)
    return Examples.real(images, torch.tensor(labels, dtype=torch.int64))


# Examples


def test_examples_are_counted_taken_and_joined() -> None:
    examples = examples_of(2, 0, 2)
    assert len(examples) == 3
    assert examples.counts(4).tolist() == [1, 0, 2, 0]
    assert not examples.synthetic.any()
    taken = examples.take(torch.tensor([2, 0]))
    assert taken.images[:, 0, 0, 0].tolist() == [8, 0] and taken.labels.tolist() == [2, 2]
    fill = Examples(images=taken.images, labels=taken.labels, synthetic=torch.ones(2, dtype=torch.bool))
    both = concatenate(examples, fill)
    assert both.labels.tolist() == [2, 0, 2, 2, 2]
    assert both.synthetic.tolist() == [False, False, False, True, True]
    assert examples_of().counts(3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", torch.zeros(2, 1, 2, 2), r"images: got torch.float32 \(2, 1, 2, 2\)"),
        ("images", torch.zeros(2, 2, 2, dtype=torch.uint8), r"images: got torch.uint8 \(2, 2, 2\)"),
        ("labels", torch.zeros(3, dtype=torch.int64), r"labels: got torch.int64 \(3,\); wanted int64 \[2\]"),
        ("labels", torch.zeros(2), "labels: got torch.float32"),
        ("synthetic", torch.zeros(2, dtype=torch.uint8), "synthetic: got torch.uint8"),
    ],
)
def test_examples_of_the_wrong_type_are_refused(field: str, value: torch.Tensor, message: str) -> None:
    good = examples_of(0, 1)
    fields = {"images": good.images, "labels": good.labels, "synthetic": good.synthetic, field: value}
    with pytest.raises(TypeError, match=message):
        Examples(**fields)


# Batches


def test_pixels_are_scaled_to_minus_one_and_one() -> None:
    scaled = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert scaled.tolist() == pytest.approx([-1.0, -0.6, 1.0])
    assert scaled.dtype == torch.float32


@pytest.mark.parametrize(("num_images", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (1, [1]), (9, [4, 4, 1])])
def test_an_epoch_uses_every_image_once(num_images: int, sizes: list[int]) -> None:
    batches = list(batch_indices(num_images, 4, torch_stream(0, "order")))
    assert [len(batch) for batch in batches] == sizes
    assert sorted(torch.cat(batches).tolist()) == list(range(num_images))


def test_epochs_are_shuffled_differently() -> None:
    rng = torch_stream(0, "order")
    first, second = (torch.cat(list(batch_indices(50, 8, rng))).tolist() for _ in range(2))
    assert first != second


@pytest.mark.parametrize(("shift", "flip"), [(0, False), (2, False), (0, True), (3, True)])
def test_augmentation_equals_the_slow_version(shift: int, flip: bool) -> None:
    images = torch.randint(0, 256, (20, 3, 6, 5), dtype=torch.uint8, generator=torch_stream(0, "images"))
    fast = augment(images, shift=shift, flip=flip, rng=torch_stream(0, "augment"))
    rng = torch_stream(0, "augment")
    offset = torch.randint(-shift, shift + 1, (2, 20, 1), generator=rng) if shift else torch.zeros(2, 20, 1, dtype=torch.int64)
    mirrored = torch.rand(20, 1, generator=rng) < 0.5 if flip else torch.zeros(20, 1, dtype=torch.bool)
    for i in range(20):
        down, right = offset[0, i].item(), offset[1, i].item()
        for row in range(6):
            for column in range(5):
                from_row = min(max(row + down, 0), 5)
                from_column = min(max((4 - column if mirrored[i] else column) + right, 0), 4)
                assert fast[i, :, row, column].tolist() == images[i, :, from_row, from_column].tolist()
    if not shift and not flip:
        assert torch.equal(fast, images)
    else:
        assert not torch.equal(fast, images)


def test_resizing_keeps_means_and_leaves_the_right_size_alone() -> None:
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8, generator=torch_stream(0, "images"))
    assert antialiased(images, 8) is images
    half = antialiased(images, 4)
    assert half.shape == (2, 1, 4, 4) and half.dtype == torch.uint8
    assert half.float().mean().item() == pytest.approx(images.float().mean().item(), abs=4.0)
    flat = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    assert (antialiased(flat, 5) == 200).all()


# Data sets that come with a package


def rows_of(*parts: Examples) -> Counter[tuple[int, bytes]]:
    """Count images with their labels; two equal images count twice, so disjoint parts add up."""
    return Counter((int(y), x.numpy().tobytes()) for part in parts for x, y in zip(part.images, part.labels, strict=True))


@pytest.fixture(scope="module")
def digits() -> DataParts:
    return load_parts(DataConfig(name="digits", num_private=-1))


@pytest.fixture(scope="module")
def mnist5k() -> DataParts:
    return load_parts(DataConfig(name="mnist5k"))


def test_parts_of_digits_are_disjoint_and_together_the_whole_data_set(digits: DataParts) -> None:
    from sklearn.datasets import load_digits

    assert [len(p) for p in (digits.test, digits.public, digits.validation, digits.private)] == [397, 300, 100, 1000]
    bunch = load_digits()
    whole = Counter(
        (int(y), np.rint(x * 255 / 16).astype(np.uint8).tobytes()) for x, y in zip(bunch.images, bunch.target, strict=True)
    )
    assert rows_of(digits.test, digits.public, digits.validation, digits.private) == whole
    assert digits.test.images.shape == (397, 1, 8, 8)
    assert digits.test.images.max() == 255 and digits.test.images.min() == 0


def test_parts_of_mnist5k_hold_every_class_equally_often(mnist5k: DataParts) -> None:
    """500 images of each class in 5,000: 100 in each 1,000."""
    assert mnist5k.test.counts(10).tolist() == [100] * 10
    assert mnist5k.public.counts(10).tolist() == [30] * 10
    assert mnist5k.validation.counts(10).tolist() == [20] * 10
    assert mnist5k.private.counts(10).tolist() == [200] * 10
    assert mnist5k.private.images.shape == (2000, 1, 28, 28)
    every = rows_of(mnist5k.test, mnist5k.public, mnist5k.validation, mnist5k.private)
    assert sum(every.values()) == 3500 and max(every.values()) == 1  # no image of MNIST-5k occurs twice


def test_the_cut_is_the_same_whatever_else_is_asked_for(digits: DataParts) -> None:
    other = load_parts(DataConfig(name="digits", num_private=50, alpha=7.0, partition="iid"))
    assert torch.equal(other.test.images, digits.test.images)
    assert torch.equal(other.public.images, digits.public.images)
    assert torch.equal(other.private.images, digits.private.images[:50])
    assert other.public_sha256 == digits.public_sha256


def test_the_public_part_is_known_by_its_content(digits: DataParts) -> None:
    assert load_parts(DataConfig(name="digits", num_validation=99, num_private=-1)).public_sha256 != digits.public_sha256
    assert load_parts(DataConfig(name="digits", image_size=9, num_private=-1)).public_sha256 != digits.public_sha256


def test_sizes_asked_for_are_sizes_got() -> None:
    parts = load_parts(DataConfig(name="digits", num_test=30, num_public=50, num_validation=20, num_private=70, image_size=16))
    assert [len(p) for p in (parts.test, parts.public, parts.validation, parts.private)] == [30, 30, 20, 70]
    assert parts.image_size == 16 and parts.info.image_size == 8
    assert parts.private.images.shape == (70, 1, 16, 16)
    no_public = load_parts(DataConfig(name="digits", num_public=0, num_private=10))
    assert [len(no_public.public), len(no_public.validation)] == [0, 0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_private": 1001}, "data.num-private: 397 test, 400 public and 1001 private images asked for; digits has 1797"),
        ({"num_private": 0}, "data.num-private: .*at least one must be private"),
        ({"num_private": -1, "num_public": 1400}, "data.num-public: .*at least one must be private"),
        ({"num_test": 900, "num_public": 900, "num_private": 1}, "data.num-test, data.num-public, data.num-private: 900 test"),
        ({"num_test": 0, "num_private": -1}, "data.num-test: got 0; the server needs at least one test image"),
        ({"num_test": 1798}, "1798 test"),
        ({"num_validation": 450, "num_private": -1}, "num-validation: got 450"),  # more than the default 400 public ones
    ],
)
def test_parts_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_parts(DataConfig(name="digits", **sizes))


def test_facts_about_the_data_sets() -> None:
    assert {name: (d.channels, d.image_size, d.num_classes, d.flip) for name, d in DATASETS.items()} == {
        "mnist5k": (1, 28, 10, False), "digits": (1, 8, 10, False), "cifar10": (3, 32, 10, True), "cifar100": (3, 32, 100, True),
        "tiny-imagenet": (3, 64, 200, True), "eurosat": (3, 64, 10, True), "fashion-mnist": (1, 28, 10, True),
    }  # fmt: skip
    for info in DATASETS.values():
        assert len(set(info.class_names)) == info.num_classes
        assert 0 < info.num_validation < info.num_public < info.num_private


@pytest.mark.parametrize(
    "folder",
    sorted(BUNDLED.glob("*/recipe.json")),
    ids=lambda path: path.parent.name,
)
def test_the_cut_is_the_one_that_the_bundled_generators_were_trained_on(folder: Path) -> None:
    """Its public images are as many as its recipe says; that they are the same ones is what keeps it from having seen test images."""
    recipe = json.loads(folder.read_text(encoding="utf-8"))
    name = recipe["data_name"]
    path = {"fashion-mnist": REAL_FASHION, "cifar10": REAL_CIFAR10}.get(name)
    if path is not None and not path.exists():
        pytest.skip(f"no {name} at {path}")
    public = recipe["num_images"] + DATASETS[name].num_validation
    parts = load_parts(DataConfig(name=name, path=str(path or ""), image_size=recipe["image_size"], num_public=public))
    assert parts.public_sha256 == recipe["public_sha256"]


@pytest.mark.parametrize(
    ("config", "public"),
    [
        (DataConfig(name="mnist5k"), "5c4156635d6da4e1cea9f1f8a463e4d27b4c8d1d9ddf038d1f285343d38f885a"),
        (DataConfig(name="mnist5k", image_size=16), "44fc79c38dbe184cab0e8148174cb6cea5a0943594f46651e93326075c642219"),
        (DataConfig(name="digits"), "f68768e13fa38498d16f155352b213a8fcdf518d3e3d2ce2746937687cfa2cad"),
    ],
    ids=["mnist5k", "mnist5k-16px", "digits"],
)
def test_the_public_part_is_that_of_the_published_results(config: DataConfig, public: str) -> None:
    assert load_parts(config).public_sha256 == public


def test_grey_images_are_given_as_colour_and_colour_as_grey(tmp_path: Path, digits: DataParts) -> None:
    colour = load_parts(DataConfig(name="digits", channels=3))
    assert colour.info.channels == 3 and colour.test.images.shape == (397, 3, 8, 8)
    assert all(torch.equal(colour.test.images[:, c], digits.test.images[:, 0]) for c in range(3))
    config = replace(write(tmp_path / "x.parquet", good_table()), channels=1)
    grey = load_parts(config)
    assert grey.info.channels == 1 and sorted(grey.test.images[:, 0, 0, 0].tolist()) == list(range(200, 210))


# Parquet files


def png(value: int, *, size: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


Table = dict[str, list[object]]


EMPTY = {"image": pyarrow.binary(), "label": pyarrow.int64(), "split": pyarrow.string()}


def good_table() -> Table:
    """40 training images of grey value 0 .. 39 and 10 test images of 200 .. 209, each class equally often."""
    return {
        "image": [png(i) for i in range(40)] + [png(200 + i) for i in range(10)],
        "label": [i % 10 for i in range(50)],
        "split": ["train"] * 40 + ["test"] * 10,
    }


def write(path: Path, table: Table) -> DataConfig:
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return DataConfig(name="cifar10", path=str(path), num_test=10, num_public=20, num_validation=5, num_private=-1)


def test_a_parquet_file_is_read_and_its_test_split_stays_the_test_part(tmp_path: Path) -> None:
    parts = load_parts(write(tmp_path / "x.parquet", good_table()))
    assert [len(p) for p in (parts.test, parts.public, parts.validation, parts.private)] == [10, 15, 5, 20]
    assert parts.test.images.shape == (10, 3, 32, 32)
    assert sorted(parts.test.images[:, 0, 0, 0].tolist()) == list(range(200, 210))
    train = concatenate(parts.public, parts.validation, parts.private)
    assert sorted(train.images[:, 0, 0, 0].tolist()) == list(range(40))
    assert train.labels.tolist() == (train.images[:, 2, 31, 31] % 10).tolist()
    assert parts.private.counts(10).tolist() == [2] * 10


def test_a_file_that_was_changed_is_read_again(tmp_path: Path) -> None:
    path, table = tmp_path / "x.parquet", good_table()
    before = load_parts(write(path, table))
    assert load_parts(write(tmp_path / "y.parquet", table)).test.images[:, 0, 0, 0].max() == 209
    table["image"][49] = png(255)
    config = write(path, table)
    os.utime(path, ns=(1, 1))
    assert before.test.images.max() == 209
    assert load_parts(config).test.images.max() == 255


def change(column: str, row: int, value: object) -> Callable[[Table], None]:
    def edit(table: Table) -> None:
        table[column][row] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("label", 7, 10), "labels 0 to 10; cifar10 has the labels 0 to 9"),
        (change("label", 7, -1), "labels -1 to 9; cifar10 has the labels 0 to 9"),
        (change("label", 7, None), "label"),
        (change("image", 7, png(1, size=16)), "row 7: 16 x 16 pixels; cifar10 has 32 x 32"),
        (change("image", 7, b"no image"), "row 7: not an image"),
        (change("image", 7, b""), "row 7: not an image"),
        (change("image", 7, None), "row 7: no image"),
        (change("image", 7, png(1)[:60]), "row 7: damaged image"),
        (change("image", 7, png(1)[:50] + b"\0\0\0\0" + png(1)[54:]), "row 7: damaged image"),
        (lambda table: table.pop("split"), "has the columns image, label, and none called split; rename yours"),
        (lambda table: table.update(label=pyarrow.array([2**63] * 50, pyarrow.uint64())), "column label: has a number above 2"),
        (lambda table: table.update(label=["cat"] * 49 + ["lynx"]), "has the label 'lynx'; the classes are airplane, automobile"),
        (lambda table: table.update(label=[0.5] * 50), "column label: got double with 0 empty rows; wanted a whole number or a name"),
        (lambda table: table.update(split=["train"] * 50), "no rows with split 'test'"),
        (lambda table: table.update(split=["test"] * 50), "no rows with split 'train'"),
        (lambda table: table.update({name: pyarrow.array([], type) for name, type in EMPTY.items()}), "has no rows"),
    ],
    ids=[
        "label-too-large", "label-negative", "label-null", "wrong-size", "undecodable", "empty-bytes", "image-null", "image-cut-short",
        "image-damaged", "column-missing", "label-huge", "label-unknown", "labels-are-fractions", "no-test", "no-train", "no-rows",
    ],
)  # fmt: skip
def test_a_bad_parquet_file_is_one_error_that_names_the_file(
    tmp_path: Path, edit: Callable[[Table], None], message: str
) -> None:
    table = good_table()
    edit(table)
    config = write(tmp_path / "bad.parquet", table)
    with pytest.raises(DataError, match=message) as caught:
        load_parts(config)
    assert str(tmp_path / "bad.parquet") in str(caught.value)
    assert caught.value.public == "DataError"  # the server learns nothing of a client's file


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_parquet_file(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.parquet"
    config = write(path, good_table())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"cut\.parquet is (empty|cut off)"):
        load_parts(config)


def test_a_missing_parquet_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"data.path: no file at {tmp_path}/none.parquet; wanted .*a parquet file of cifar10"):
        load_parts(DataConfig(name="cifar10", path=str(tmp_path / "none.parquet")))
    with pytest.raises(DataError, match="nothing of cifar10 in"):
        load_parts(DataConfig(name="cifar10", path=str(tmp_path)))


def test_more_test_images_than_the_test_split_has(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", good_table())
    with pytest.raises(ConfigError, match=r"data\.num-test: got 11; the test split of cifar10 has 10 images"):
        load_parts(DataConfig(name="cifar10", path=str(tmp_path / "x.parquet"), num_test=11, num_public=5, num_private=5))


@pytest.mark.skipif(not REAL_CIFAR10.is_file(), reason=f"no CIFAR-10 at {REAL_CIFAR10}; FBL_SHARED_DATA names its folder")
def test_some_rows_of_the_real_cifar10_file(tmp_path: Path) -> None:
    """250 images of the file, so that the test costs little."""
    whole = pyarrow.parquet.read_table(REAL_CIFAR10)
    split = np.array(whole["split"].to_pylist())
    assert ((split == "train").sum(), (split == "test").sum()) == (50_000, 10_000)
    rows = np.concatenate([np.flatnonzero(split == name)[::step] for name, step in (("train", 250), ("test", 200))])
    pyarrow.parquet.write_table(whole.take(rows), tmp_path / "some.parquet")
    parts = load_parts(
        DataConfig(
            name="cifar10", path=str(tmp_path / "some.parquet"), num_test=50, num_public=100, num_validation=20, num_private=100
        )
    )
    assert [len(p) for p in (parts.test, parts.public, parts.validation, parts.private)] == [50, 80, 20, 100]
    assert parts.private.labels.unique().tolist() == list(range(10))
    assert 60 < parts.private.images.float().mean() < 180 and parts.private.images.float().std() > 30
    assert not torch.equal(parts.private.images[:, 0], parts.private.images[:, 2])  # in colour
