"""`fbl-flower generator`, as a user types it: train in floats, store in 4 and 8 bits, compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fbl_flower.cli import main, widths
from fbl_flower.commands.generator import default_deformation
from fbl_flower.data.info import DATASETS
from fbl_flower.generation.recipe import read_info

DIGITS = ["--data", "digits", "--threads", "1"]
SMALL = [*DIGITS, "-c", "model.name='tiny'"]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that was trained for two steps, in floats."""
    folder = tmp_path_factory.mktemp("generators") / "floats"
    options = ["--out", str(folder), "--steps", "2", "--batch-size", "8", "--widths", "32", "--weights", "none"]
    assert main(["generator", "train", *DIGITS, *options]) == 0
    return folder


def test_train_in_floats_then_quantize_and_compare(floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four, eight = tmp_path / "four", tmp_path / "eight"
    for folder, weights in ((four, "4bit"), (eight, "8bit")):
        assert main(["generator", "quantize", str(floats), str(folder), "--weights", weights, "--threads", "1"]) == 0
        assert read_info(folder).weights == weights
    capsys.readouterr()
    out = tmp_path / "quality.json"
    options = ["--seeds", "0,1", "--epochs", "1", "--out", str(out)]
    assert main(["generator", "quality", str(floats), str(four), str(eight), *SMALL, *options]) == 0
    printed, warned = capsys.readouterr()
    assert warned.count("the network that judges gives only") == 3  # a tiny network after one epoch
    assert f"| 300 images, against test | {floats} | {four} | {eight} |" in printed
    measured = json.loads(out.read_text())["generators"]
    assert list(measured) == [str(floats), str(four), str(eight)]
    public = [[one["public_accuracy"] for one in quality["per_seed"]] for quality in measured.values()]
    assert public[0] == public[1] == public[2]  # the same classifiers judge all three
    sizes = [quality["num_bytes"] for quality in measured.values()]
    assert sizes[0] > sizes[2] > sizes[1]
    assert all(quality["peak_mb"] > 100 for quality in measured.values())


def test_digits_are_deformed_and_photographs_are_not(floats: Path, tmp_path: Path) -> None:
    assert (default_deformation(DATASETS["cifar10"]), default_deformation(DATASETS["digits"])) == (0, 1)
    assert read_info(floats).training.augmentation.rotation == 12
    options = ["--steps", "1", "--batch-size", "8", "--widths", "32", "--augmentation", "0.5"]
    assert main(["generator", "train", *DIGITS, *options, "--out", str(tmp_path / "g")]) == 0
    assert read_info(tmp_path / "g").training.augmentation.rotation == 6


def test_options_of_pipelines_are_refused_for_a_trained_generator(
    floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generator", "quantize", str(floats), str(tmp_path / "g"), "--revision", "main"]) == 2
    assert "--tiny-decoder, --full-decoder, --revision, --dtype: only for pipelines" in capsys.readouterr().err


def test_a_place_that_is_not_there_is_told_before_the_work(
    floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fbl_flower.commands.quality.measure_quality", lambda *_, **__: pytest.fail("worked"))
    monkeypatch.setattr("fbl_flower.commands.bench.measure", lambda *_, **__: pytest.fail("worked"))
    for command in (["generator", "quality"], ["bench", "generator"]):
        assert main([*command, str(floats), *SMALL, "--out", str(tmp_path / "none" / "x.json")]) == 2
        assert f"--out: no folder at {tmp_path / 'none'} for x.json" in capsys.readouterr().err


def test_settings_that_a_training_does_not_take_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "g"
    assert main(["generator", "train", *DIGITS, "--out", str(out), "-c", "seed=7 train.epochs=2 data.num-public=350"]) == 2
    assert "seed, train.epochs: a training takes only data.* and device from -c" in capsys.readouterr().err and not out.exists()
    assert main(["generator", "train", *DIGITS, "--out", str(out), "--minutes", "nan"]) == 2
    assert "--checkpoint-every, --minutes: got 100, nan; allowed: >= 1, > 0" in capsys.readouterr().err


def test_a_gallery_that_cannot_be_written_leaves_the_one_before(
    floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gallery.png"
    command = ["generator", "gallery", str(floats), *DIGITS, "--out", str(out)]
    assert main(command) == 0
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fbl_flower.whole_file.os.replace", full)
    assert main(command) != 0
    assert f"{out} cannot be written (No space left on device)" in capsys.readouterr().err
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]
    monkeypatch.undo()
    assert main([*command[:-1], str(tmp_path)]) == 2 and f"--out: {tmp_path} is a folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*command[:-1], str(tmp_path / "file" / "x.png")]) == 1
    assert f"{tmp_path / 'file' / 'x.png'} cannot be written" in capsys.readouterr().err


def test_public_images_are_measured_under_their_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generator", "quality", *DIGITS, "--seeds", "0", "--epochs", "30"]
    assert main([*command, "-c", "model.name='tiny' generator.name='public-images'"]) == 0
    printed, warned = capsys.readouterr()
    assert printed.startswith("public-images\n") and "gives only" not in warned


def test_widths_may_repeat() -> None:
    assert widths("64,128,128") == (64, 128, 128)
