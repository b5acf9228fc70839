"""How a data set is cut: by what its images show, whatever file they came from."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import save_image, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from fbl_flower.config import DataConfig
from fbl_flower.data.datasets import DataParts, load_parts
from fbl_flower.data.identity import pixel_keys
from fbl_flower.errors import ConfigError

REAL_CIFAR10 = Path(os.environ.get("FBL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cifar10-png.parquet"
PARTS = ("test", "public", "validation", "private")


def in_parquet(path: Path, images: list[bytes], labels: list[int], splits: list[str] | None = None) -> Path:
    columns = {"image": images, "label": pa.array(labels, pa.int32())}
    pq.write_table(pa.table(columns | ({"split": splits} if splits else {})), path)
    return path


def png(folder: Path, *colour: int) -> bytes:
    return save_image(folder / f"{'-'.join(map(str, colour))}.png", colour, size=(4, 4)).read_bytes()


def shown(parts: DataParts) -> dict[str, list[list[int]]]:
    """The first pixel and the label of each image, in order."""
    return {
        name: torch.cat([part.images[:, :, 0, 0].int(), part.labels[:, None].int()], dim=1).tolist()
        for name, part in ((name, getattr(parts, name)) for name in PARTS)
    }


def test_keys_tell_images_apart_and_nothing_else() -> None:
    images = torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2)
    keys = pixel_keys(images[[0, 1, 2, 3, 1]])
    assert keys.dtype == np.uint64 and len(set(keys.tolist())) == 4 and keys[1] == keys[4]
    assert pixel_keys(images[1:2])[0] == keys[1]  # whatever stands beside it
    assert pixel_keys(images.view(4, 1, 4, 3))[0] != keys[0]  # the same bytes in another shape
    assert pixel_keys(images[:0]).shape == (0,)


def test_the_order_of_the_files_does_not_matter(tmp_path: Path) -> None:
    """Class folders, a parquet file, and one in another order: the same parts, image by image."""
    write_folder(tmp_path / "photos", {"a": 40, "b": 30, "c": 20})
    sizes = {"num_test": 12, "num_public": 16, "num_validation": 4}
    folder = load_parts(DataConfig(name="folder", path=str(tmp_path / "photos"), **sizes))  # type: ignore[arg-type]
    images, labels = [], []
    for label, name in enumerate("abc"):
        for file in sorted((tmp_path / "photos" / name).iterdir()):
            images.append(file.read_bytes())
            labels.append(label)
    order = np.random.default_rng(0).permutation(len(labels))
    for name, index in (("same", range(len(labels))), ("shuffled", order)):
        file = in_parquet(tmp_path / f"{name}.parquet", [images[i] for i in index], [labels[i] for i in index])
        parts = load_parts(DataConfig(name="parquet", path=str(file), **sizes))  # type: ignore[arg-type]
        assert shown(parts) == shown(folder)
        assert parts.public_sha256 == folder.public_sha256
        assert {k: v for k, v in parts.identity.items() if k != "classes"} == {
            k: v for k, v in folder.identity.items() if k != "classes"
        }
    assert [len(getattr(folder, name)) for name in PARTS] == [12, 12, 4, 62]


@settings(max_examples=40)
@given(st.data())
def test_equal_images_are_in_one_part(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is repeated, under whatever labels; and nothing is lost or doubled."""
    folder = tmp_path_factory.mktemp("images")
    shades = data.draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=40, max_size=80))
    single = [(value, value % 3) for value in range(100, 140)]
    rows = shades + single
    file = in_parquet(folder / "x.parquet", [png(folder, v, 0, 0) for v, _ in rows], [label for _, label in rows])
    num_test, num_public = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 30))
    config = DataConfig(
        name="parquet", path=str(file), classes="x,y,z", num_test=num_test, num_public=num_public,
        num_validation=num_public // 3,
    )  # fmt: skip
    parts = shown(load_parts(config))
    where = [{row[0] for row in parts[name]} for name in PARTS]
    assert sum(map(len, where)) == len(set().union(*where))
    assert sorted((row[0], row[3]) for name in PARTS for row in parts[name]) == sorted(rows)
    assert len(parts["test"]) == num_test  # there are single images enough to fill the part exactly


def test_copies_of_test_images_are_left_out_of_training(tmp_path: Path) -> None:
    """30 training images, of which 3 are also in the test split: 27 are left, and the data set says so."""
    images = [png(tmp_path, value, 1, 1) for value in range(30)] + [png(tmp_path, value, 1, 1) for value in (3, 4, 5, 40, 41)]
    file = in_parquet(tmp_path / "x.parquet", images, [i % 2 for i in range(35)], ["train"] * 30 + ["test"] * 5)
    parts = load_parts(DataConfig(name="parquet", path=str(file), num_public=4, num_validation=0))
    assert len(parts.test) == 5 and len(parts.public) + len(parts.private) == 27
    assert {3, 4, 5}.isdisjoint(row[0] for name in ("public", "private") for row in shown(parts)[name])
    assert parts.notes == ("3 training images are copies of test images and are left out",)


def test_images_that_are_all_equal_cannot_be_cut(tmp_path: Path) -> None:
    file = in_parquet(tmp_path / "x.parquet", [png(tmp_path, 0, 0, 0)] * 60, [i % 2 for i in range(60)])
    with pytest.raises(ConfigError, match=r"data\.num-test"):
        load_parts(DataConfig(name="parquet", path=str(file)))


def test_sizes_that_groups_of_equal_images_do_not_allow_are_told(tmp_path: Path) -> None:
    """Ten images, each twice: three test images become two, and the data set says so; one private image cannot be had at all."""
    images = [png(tmp_path, value, 2, 2) for value in range(10) for _ in range(2)]
    file = in_parquet(tmp_path / "x.parquet", images, [i % 2 for i in range(20)])
    parts = load_parts(DataConfig(name="parquet", path=str(file), num_test=3, num_public=5, num_validation=1))
    assert [len(getattr(parts, name)) for name in PARTS] == [2, 4, 0, 14]
    assert [note.partition(":")[0] for note in parts.notes] == [
        "2 test images instead of 3", "0 validation images instead of 1",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.num-private: no private image is left"):
        load_parts(DataConfig(name="parquet", path=str(file), num_test=3, num_public=5, num_validation=1, num_private=1))


def test_the_error_counts_the_images_that_can_be_used(tmp_path: Path) -> None:
    images = [png(tmp_path, value, 1, 1) for value in (*range(20), *range(8))]
    file = in_parquet(tmp_path / "x.parquet", images, [i % 2 for i in range(28)], ["train"] * 20 + ["test"] * 8)
    with pytest.raises(ConfigError, match="has 12 for those parts.*8 training images are copies of test images"):
        load_parts(DataConfig(name="parquet", path=str(file), num_public=12, num_validation=0))


@pytest.mark.parametrize("change", [{"image_size": 16}, {"channels": 1}, {"image_size": 4, "channels": 1}])
def test_size_and_channels_do_not_change_the_cut_of_ones_own_images(tmp_path: Path, change: dict[str, int]) -> None:
    """The key is of the pixels in the file. Each image has a shade of red of its own, which grey and scaled images keep in order."""
    write_folder(tmp_path, {"a": 30, "b": 30, "c": 30})
    shades = []
    for settings_ in ({"image_size": 8}, {"image_size": 8} | change):
        parts = load_parts(DataConfig(name="folder", path=str(tmp_path), **settings_))  # type: ignore[arg-type]
        values = [getattr(parts, name).images[:, 0, 0, 0].int() for name in PARTS]
        labels = [getattr(parts, name).labels for name in PARTS]
        shades.append([[len(v), *y.tolist(), *v.argsort(stable=True).tolist()] for v, y in zip(values, labels, strict=True)])
    if "channels" not in change:
        assert shades[0] == shades[1]
    assert [row[: 1 + row[0]] for row in shades[0]] == [row[: 1 + row[0]] for row in shades[1]]


@pytest.mark.parametrize("size", [8, 14])
def test_the_size_in_use_does_not_change_the_cut(size: int) -> None:
    """Parts are cut by the native pixels: the classes of the public images, in order, are the same at every size."""
    native, other = (load_parts(DataConfig(name="digits", image_size=s)) for s in (0, size))
    assert torch.equal(native.public.labels, other.public.labels)
    assert torch.equal(native.private.labels, other.private.labels)


def test_the_identity_tells_what_changed(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 20, "b": 20})
    before = load_parts(DataConfig(name="folder", path=str(tmp_path))).identity
    (tmp_path / "b").rename(tmp_path / "d")
    renamed = load_parts(DataConfig(name="folder", path=str(tmp_path))).identity
    assert {key for key in before if before[key] != renamed[key]} == {"classes"}
    save_image(tmp_path / "a" / "new.png", (9, 9, 9))
    grown = load_parts(DataConfig(name="folder", path=str(tmp_path))).identity
    assert "private" in {key for key in before if renamed[key] != grown[key]}


@pytest.mark.skipif(not REAL_CIFAR10.is_file(), reason=f"no CIFAR-10 at {REAL_CIFAR10}; FBL_SHARED_DATA names its folder")
@pytest.mark.slow
def test_cifar10_is_cut_as_in_the_published_results() -> None:
    parts = load_parts(DataConfig(name="cifar10", path=str(REAL_CIFAR10)))
    assert [len(getattr(parts, name)) for name in PARTS] == [10_000, 4_500, 500, 45_000]
    assert parts.public_sha256 == "1a6906a2829d2820b2c1b754fe8e30849fc3790fac89f91033261f4a6f225ba4"
    assert parts.private.counts(10).tolist() == [4_500] * 10 and parts.notes == ()
