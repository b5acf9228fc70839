"""What names mean: splits, class names of any letters, files passed over, and each form of a named data set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import save_image, write_folder
from PIL import Image
from test_damaged_images import NOISE, encoded

from fbl_flower.commands.overrides import chosen_config, read_toml
from fbl_flower.config import DataConfig, flatten, parse_config, to_toml
from fbl_flower.data.datasets import DATASETS, load_parts
from fbl_flower.data.readers.names import shown
from fbl_flower.data.readers.splits import split_named
from fbl_flower.data.sources import image_format, read_source
from fbl_flower.errors import ConfigError, DataError


def folder(path: Path, **settings: object) -> DataConfig:
    return DataConfig(name="folder", path=str(path), **settings)  # type: ignore[arg-type]


def write_table(file: Path, first: int, *, number: int = 10, **columns: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    blobs = [encoded(Image.new("RGB", (8, 8), (first + i, 0, 0)), "PNG") for i in range(number)]
    pyarrow.parquet.write_table(pyarrow.table({"image": blobs, "label": [i % 2 for i in range(number)]} | columns), file)


def reds(examples: object) -> list[int]:
    return sorted(examples.images[:, 0, 0, 0].tolist())  # type: ignore[attr-defined]


# Splits


@pytest.mark.parametrize(("name", "split"), [
    ("Train", "train"), ("training", "train"), ("train_images", "train"), ("TEST", "test"), ("test-set", "test"), ("evaluation", "eval"),
    ("held-out", "holdout"), ("hold_out", "holdout"), ("val2017", "validation"), ("development", "dev"), ("bullet train", None),
    ("latest", None), ("unlabeled", None), ("train-test", None), ("007", None), ("contest", None),
])  # fmt: skip
def test_words_for_splits(name: str, split: str | None) -> None:
    assert split_named(name) == split


@pytest.mark.parametrize("held_out", ["eval", "testing", "held-out", "development", "Valid"])
def test_synonyms_are_the_test_split(tmp_path: Path, held_out: str) -> None:
    write_folder(tmp_path / "f" / "training", {"ant": 6, "bee": 6})
    write_folder(tmp_path / "f" / held_out, {"bee": 3}, first=100)
    assert reds(load_parts(folder(tmp_path / "f")).test) == [100, 101, 102]
    write_table(tmp_path / "p" / "training-0.parquet", 0)
    write_table(tmp_path / "p" / f"{held_out}-0.parquet", 100, number=4)
    assert reds(load_parts(DataConfig(name="parquet", path=str(tmp_path / "p"))).test) == [100, 101, 102, 103]
    column = ["training"] * 6 + [held_out] * 4
    write_table(tmp_path / "c.parquet", 0, split=column)
    assert reds(load_parts(DataConfig(name="parquet", path=str(tmp_path / "c.parquet"))).test) == [6, 7, 8, 9]


def test_of_several_held_out_splits_the_rest_is_left_out_and_said(tmp_path: Path) -> None:
    for first, name in ((0, "train"), (50, "dev"), (60, "eval"), (70, "val")):
        write_folder(tmp_path / "f" / name, {"ant": 5, "bee": 5}, first=first)
        write_table(tmp_path / "p" / name / "0.parquet", first)
    parts = load_parts(folder(tmp_path / "f"))
    assert reds(parts.test) == list(range(60, 70)) and "left out: the splits val, dev; eval is the test split" in parts.notes
    parts = load_parts(DataConfig(name="parquet", path=str(tmp_path / "p")))
    assert reds(parts.test) == list(range(60, 70))
    assert "left out: the splits validation (10 rows), dev (10 rows); eval is the test split" in parts.notes


@pytest.mark.parametrize("other", ["unlabeled", "extra", "submission", "ants", "pool"])
def test_an_unknown_split_beside_known_ones_is_an_error(tmp_path: Path, other: str) -> None:
    for name in ("train", "test", other):
        write_folder(tmp_path / "f" / name, {"ant": 5})
        write_table(tmp_path / "p" / f"{name}-0.parquet", 0)
        write_table(tmp_path / "d" / name / "0.parquet", 0)
    write_table(tmp_path / "c.parquet", 0, split=["train"] * 5 + ["test"] * 2 + [other] * 3)
    with pytest.raises(DataError, match=f"has the splits test, train, and beside them {other}, which is no split"):
        load_parts(folder(tmp_path / "f"))
    for path, text in (
        ("p", f"beside them {other}-0.parquet"),
        ("d", f"beside them {other}/0.parquet"),
        ("c.parquet", f"'{other}' .3 rows"),
    ):
        with pytest.raises(DataError, match=text):
            load_parts(DataConfig(name="parquet", path=str(tmp_path / path)))


def test_files_without_a_split_are_training_data_if_only_numbers_differ(tmp_path: Path) -> None:
    for i in range(2):
        write_table(tmp_path / "shards" / f"data-0000{i}-of-00002.parquet", 10 * i)
        write_table(tmp_path / "numbers" / f"000{i}.parquet", 10 * i)
        write_table(tmp_path / "spark" / f"part-0000{i}-1c6d8a1e-0b52-4b1c-9f0e-d41d8cd98f0{i}-c000.parquet", 10 * i)
        write_table(tmp_path / "names" / f"{('cats', 'dogs')[i]}.parquet", 10 * i)
    for name in ("shards", "numbers", "spark"):
        assert (
            len(read_source(config := DataConfig(name="parquet", path=str(tmp_path / name)), Path(config.path))[1].train) == 20
        )
    with pytest.raises(
        DataError, match=r"different names that tell no split: cats.parquet, dogs.parquet. Expected train and test"
    ):
        load_parts(DataConfig(name="parquet", path=str(tmp_path / "names")))
    write_table(tmp_path / "one" / "unlabeled.parquet", 0)
    with pytest.raises(DataError, match="unlabeled.parquet: named as images that are not for training"):
        load_parts(DataConfig(name="parquet", path=str(tmp_path / "one")))


def test_classes_that_are_called_like_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "v", {"bus": 10, "train": 10})
    assert load_parts(folder(tmp_path / "v")).info.class_names == ("bus", "train")
    write_folder(tmp_path / "flat", {"train": 5, "test": 5})
    with pytest.raises(DataError, match="images directly in .*, named after splits.*or set data.classes"):
        load_parts(folder(tmp_path / "flat"))
    assert load_parts(folder(tmp_path / "flat", classes="test,train")).info.class_names == ("test", "train")


def test_hive_folders_of_labels_say_what_would_work(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_table(tmp_path / f"label={name}" / "0.parquet", 0)
    with pytest.raises(DataError, match=r"a folder for each label \(label=cat.*Expected the column label in the files"):
        load_parts(DataConfig(name="parquet", path=str(tmp_path)))


# Files passed over


def test_files_passed_over_are_counted_by_kind(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 8, "bee": 8})
    for name in ("a.txt", "b.TXT", "c.mp4", ".DS_Store", "noending"):
        (tmp_path / "ant" / name).write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("x")
    notes = load_parts(folder(tmp_path)).notes
    assert notes == ("files passed over: 2 .txt, 1 .csv outside the class folders, 1 .mp4, 1 hidden, 1 without an ending",)


@pytest.mark.parametrize("suffix", [".jfif", ".webp", ".avif", ".JPE", ".bmp", ".tga"])
def test_every_ending_that_pillow_reads_is_an_image(tmp_path: Path, suffix: str) -> None:
    write_folder(tmp_path, {"ant": 8})
    for i in range(8):
        kind = {".jfif": "JPEG", ".jpe": "JPEG"}.get(suffix.lower(), suffix[1:].upper())
        path = tmp_path / "bee" / f"{i}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(NOISE.crop((i, i, i + 8, i + 8)), kind))
    assert sum(len(p) for p in (load_parts(folder(tmp_path)).test, load_parts(folder(tmp_path)).private)) > 8


def test_a_class_of_files_that_are_no_images_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 8})
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee" / ".gitkeep").touch()
    assert load_parts(folder(tmp_path)).info.class_names == ("ant", "bee")
    for i in range(3):
        (tmp_path / "bee" / f"{i}.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no images in the class directory .*/bee, whose files are 3 \.heic"):
        load_parts(folder(tmp_path))


# Class names

ODD = ("salmon, wild", "potter's wheel", ' "quoted" ', "Ä pfel", "日本", "a=b #c")


@pytest.mark.parametrize("form", ["json", "lines", "json-file"])
def test_class_names_of_any_letters(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ODD if form != "lines" else tuple(name.strip() for name in ODD)
    text = json.dumps(names)
    if form != "json":
        content = "\r\n".join(names) + "\r\n" if form == "lines" else text
        (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
        text = "@names.txt"
    config = parse_config({"data.name": "folder", "data.path": "x", "data.classes": text})
    assert config.data.class_names == names and not config.data.classes.startswith("@")
    (tmp_path / "again.toml").write_text(to_toml(flatten(config)), encoding="utf-8-sig")
    assert parse_config(read_toml(tmp_path / "again.toml")) == config
    if form != "json":  # the list fits between single quotes
        assert (
            chosen_config([f"data.name='folder' data.path='x' data.classes='{config.data.classes}'"])[0].data.class_names
            == names
        )


@pytest.mark.parametrize(("text", "message"), [
    ('["a", 1]', "a JSON list that holds more than texts"), ('["a"', "begins like a JSON list and is none"), ("@none.txt", "cannot be read"),
    ('["a", "a"]', "none empty and none twice"), ("a,,b", "none empty and none twice"), ('[""]', "none empty"),
])  # fmt: skip
def test_class_lists_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"data.classes: got .*{message}"):
        parse_config({"data.name": "folder", "data.path": "x", "data.classes": text})


def test_a_name_that_is_not_utf8_is_one_clear_error(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 8})
    bad = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(bad)
    Image.new("RGB", (8, 8)).save(os.fsdecode(bad) + "/0.png")
    with pytest.raises(DataError) as caught:
        load_parts(folder(tmp_path))
    assert r"caf\xe9" in str(caught.value) and "not UTF-8" in str(caught.value)
    str(caught.value).encode()
    assert shown(os.fsdecode(b"caf\xe9")) == r"caf\xe9"


def test_an_ascii_locale_reads_the_same_classes(tmp_path: Path) -> None:
    for i, name in enumerate(("Äpfel, rot", "日本")):
        for j in range(8):
            save_image(tmp_path / "Bilder ü" / name / f"{j}.png", (i, j, 0))
    (tmp_path / "c.toml").write_text(f"data.name = 'folder'\ndata.path = '{tmp_path}/Bilder ü'\n", encoding="utf-8")
    script = (
        "import sys; from fbl_flower.commands.overrides import chosen_config; from fbl_flower.data.datasets import load_parts;"
        "p = load_parts(chosen_config(sys.argv[1:])[0].data); print(ascii(p.info.class_names), len(p.private))"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    listed = 'data.classes=\'["日本", "Äpfel, rot"]\''
    for extra, names in ((), ("Äpfel, rot", "日本")), ((listed,), ("日本", "Äpfel, rot")):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "c.toml"), *extra], env=os.environ | locale, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(ascii(names))


# Named data sets in each of their forms


def images_of(name: str, number: int) -> list[Image.Image]:
    info = DATASETS[name]
    shape = (info.image_size, info.image_size) + ((3,) if info.channels == 3 else ())
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(number)]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "eurosat"])
def test_named_data_sets_are_the_same_in_every_form(tmp_path: Path, name: str) -> None:
    """Class folders by name and by number, flat parquet, and parquet whose metadata has the classes in another order."""
    info, images = DATASETS[name], images_of(name, 24)
    labels = [i % len(info.class_names) for i in range(24)]
    splits = ["train"] * 16 + ["test"] * 8
    for image, label, split, i in zip(images, labels, splits, range(24), strict=True):
        for form, directory in (("names", info.class_names[label].replace("/", "_").upper()), ("numbers", f"{label:02d}")):
            path = tmp_path / form / split / directory / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    blobs = [encoded(image, "PNG") for image in images]
    flat = pyarrow.table({"image": blobs, "label": labels, "split": splits})
    pyarrow.parquet.write_table(flat, tmp_path / "flat.parquet")
    order = sorted(info.class_names, reverse=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": order}}
    for split in ("train", "test"):
        rows = [i for i in range(24) if splits[i] == split]
        table = pyarrow.table({
            "image": [{"bytes": blobs[i], "path": None} for i in rows],
            "label": [order.index(info.class_names[labels[i]]) for i in rows],
        }).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})  # fmt: skip
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    expected = {(np.asarray(image).tobytes(), label) for image, label in zip(images, labels, strict=True)}
    for form in ("names", "numbers", "flat.parquet", "hub"):
        config = DataConfig(name=name, path=str(tmp_path / form))
        source = read_source(config, tmp_path / form)[1]
        assert source.test is not None and (len(source.train), len(source.test)) == (16, 8), form
        found = set()
        for part in (source.train, source.test):
            for image, label in zip(part.images, part.labels.tolist(), strict=True):
                found.add((image.permute(1, 2, 0).numpy().tobytes(), label))
        assert found == expected, form
    assert image_format(DataConfig(name=name)).label_of("nothing") is None


def test_a_named_data_set_in_folders_needs_its_test_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "cifar", {"cat": 3})
    with pytest.raises(DataError, match="has no test split; expected class directories below .*/train and .*/test"):
        load_parts(DataConfig(name="cifar10", path=str(tmp_path / "cifar")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing of cifar10 in .*expected the folder cifar-10-batches-py, a parquet file"):
        load_parts(DataConfig(name="cifar10", path=str(tmp_path / "empty")))


@pytest.mark.parametrize("inner", ["", "images"])
def test_tiny_imagenet_whose_val_was_sorted(tmp_path: Path, inner: str) -> None:
    for split, number in (("train", 6), ("val", 2)):
        for label, wnid in ((3, "n01644900"), (0, "n01443537")):
            for i in range(number):
                save_image(
                    tmp_path / split / wnid / (inner if split == "val" else "images") / f"{i}.JPEG",
                    (label, 20 * i, 9),
                    size=(64, 64),
                )
    config = DataConfig(name="tiny-imagenet", path=str(tmp_path))
    source = read_source(config, tmp_path)[1]
    assert source.test is not None and sorted(source.test.labels.tolist()) == [0, 0, 3, 3] and len(source.train) == 12


# Causes of a parquet file that cannot be read


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid x", "pointer of Git LFS"), (b"<html>not found</html>", "not a parquet file: it begins with"),
    (b"PAR1" + bytes(40), "is cut off"), (b"PAR1" + bytes(40) + b"PAR1", "is damaged"),
])  # fmt: skip
def test_each_cause_has_its_own_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=f"x.parquet (is (a )?)?{message}"):
        load_parts(DataConfig(name="parquet", path=str(tmp_path / "x.parquet")))


@pytest.mark.parametrize("column", [
    ["a.png", "b.png"], [{"bytes": None, "path": "a.png"}] * 2, [{"path": "a.png"}] * 2,
    pyarrow.array([{"bytes": None, "path": "a.png"}] * 2, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
])  # fmt: skip
def test_paths_are_not_images(tmp_path: Path, column: object) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "label": [0, 1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="x.parquet, column image: holds paths, not images"):
        load_parts(DataConfig(name="parquet", path=str(tmp_path / "x.parquet")))
