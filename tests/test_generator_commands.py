"""`fbl-flower generator`, as a user types it: train in floats, store in 4 and 8 bits, compare."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fbl_flower.cli import decimals, main, widths
from fbl_flower.commands.json_file import write_json
from fbl_flower.config import ModelConfig
from fbl_flower.data.info import DATASETS
from fbl_flower.generation.augment import default_deformation
from fbl_flower.generation.recipe import read_info
from fbl_flower.training import judge

DIGITS = ["--data", "digits", "--threads", "1"]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that was trained for two steps, in floats."""
    folder = tmp_path_factory.mktemp("generators") / "floats"
    options = ["--out", str(folder), "--steps", "2", "--batch-size", "8", "--widths", "32", "--weights", "none"]
    assert main(["generator", "train", *DIGITS, *options]) == 0
    return folder


@pytest.mark.usefixtures("quick_judge")
def test_train_in_floats_then_quantize_and_compare(floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four, eight = tmp_path / "four", tmp_path / "eight"
    for folder, weights in ((four, "4bit"), (eight, "8bit")):
        assert main(["generator", "quantize", str(floats), str(folder), "--weights", weights, "--threads", "1"]) == 0
        assert read_info(folder).weights == weights
    capsys.readouterr()
    out = tmp_path / "quality.json"
    options = ["--seeds", "0,1", "--out", str(out), "-c", "model.stem='imagenet' train.learning-rate=1e6 generator.steps=2"]
    assert main(["generator", "quality", str(floats), str(four), str(eight), *DIGITS, *options]) == 0
    printed, warned = capsys.readouterr()
    assert warned.count("model.stem, train.learning-rate: not used; the judge has a recipe of its own") == 1
    assert printed.count("% of the real test images.") == 3 and "| sampling | 2 steps, guidance 1.5 |" in printed
    assert f"| 300 images, against test | {floats} | {four} | {eight} |" in printed
    written = json.loads(out.read_text(), parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))
    assert written["judge"]["min_steps"] == 100
    measured = written["generators"]
    assert all(quality["judge_accuracy"] > 0.4 for quality in measured.values())
    assert list(measured) == [str(floats), str(four), str(eight)]
    public = [[one["real_accuracy"] for one in quality["per_seed"]] for quality in measured.values()]
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
        assert main([*command, str(floats), *DIGITS, "--out", str(tmp_path / "none" / "x.json")]) == 2
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


@pytest.mark.usefixtures("quick_judge")
def test_public_images_are_measured_under_their_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generator", "quality", *DIGITS, "--seeds", "0"]
    assert main([*command, "-c", "generator.name='public-images'"]) == 0
    printed, warned = capsys.readouterr()
    assert printed.startswith("public-images\n") and "not used" not in warned


def test_a_judge_that_has_not_learned_is_refused(
    floats: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "JUDGE_MODEL", ModelConfig(name="tiny"))
    monkeypatch.setattr(judge, "JUDGE_TRAINING", replace(judge.JUDGE_TRAINING, learning_rate=1e-9))
    monkeypatch.setattr(judge, "MIN_EPOCHS", 1)
    monkeypatch.setattr(judge, "MIN_STEPS", 1)
    before = (floats / "recipe.json").read_bytes()
    assert main(["generator", "tune", str(floats), *DIGITS, "--steps", "1", "--guidance", "1"]) == 1
    assert "fbl-flower: failed: the judge is right on only" in capsys.readouterr().err
    assert (floats / "recipe.json").read_bytes() == before


@pytest.mark.usefixtures("quick_judge")
def test_tune_writes_the_best_into_the_recipe(floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = shutil.copytree(floats, tmp_path / "g"), tmp_path / "tuning.json"
    before = (folder / "recipe.json").read_bytes()
    command = ["generator", "tune", str(folder), *DIGITS, "--steps", "1,2", "--guidance", "1,3", "--images", "60"]
    assert main([*command, "--dry-run", "--out", str(out)]) == 0
    assert (folder / "recipe.json").read_bytes() == before and "dry run" in capsys.readouterr().out
    assert main(command) == 0
    printed = capsys.readouterr().out
    sampling = read_info(folder).sampling
    assert sampling is not None and f"\n{sampling}: the fewest evaluations" in printed
    found, tried = sampling.chosen_on, json.loads(out.read_text())
    assert [(one["steps"], one["guidance"]) for one in found["candidates"]] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert (found["data"], found["weights"], found["num_images"], found["num_validation"]) == ("digits", "none", 60, 100)
    assert found["judge_accuracy"] > 0.4
    assert [one["accuracies"] for one in tried["candidates"]] == [
        one["accuracies"] for one in found["candidates"]
    ]  # repeatable
    four = tmp_path / "four"
    assert main(["generator", "quantize", str(folder), str(four), "--threads", "1"]) == 0
    assert read_info(four).sampling == sampling  # it travels with the generator


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0,4"], "--steps: expected a whole number from 1 to 1000, got 0"),
        (["--guidance", "nan"], "--guidance: expected a number from 1 to 20, got nan"),
        (["--guidance", "1,0.5"], "--guidance: expected a number from 1 to 20, got 0.5"),
        (["--guidance", "2,2.0"], "--guidance: expected each value once, got 2, 2"),
        (["--images", "-1"], "--images: expected a whole number >= 0, got -1"),
        (["--images", "301"], "expected at most 300 images, one for each public image, got 301"),
        (["-c", "generator.steps=4"], "generator.steps: the candidates are given with --steps"),
        (["-c", "generator.name='public-images'"], "only diffusion generators have a recipe to tune"),
    ],
)
@pytest.mark.usefixtures("quick_judge")
def test_bad_input_of_tune_is_one_error(
    floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    folder = shutil.copytree(floats, tmp_path / "g")
    assert main(["generator", "tune", str(folder), *DIGITS, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("fbl-flower: ") == 1


@pytest.mark.usefixtures("quick_judge")
def test_a_recipe_that_cannot_be_written_is_told_before_the_work(
    floats: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fbl_flower.commands.quality.tune_sampling", lambda *_, **__: pytest.fail("worked"))
    monkeypatch.setattr(Path, "touch", denied)
    assert main(["generator", "tune", str(floats), *DIGITS]) == 2
    assert f"cannot write {floats / 'recipe.json'} (Permission denied). Check its permissions" in capsys.readouterr().err


def test_no_number_that_json_does_not_know_is_written(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    write_json(out, {"x": None})
    for value in (float("nan"), float("inf"), [1.0, float("-inf")]):
        with pytest.raises(ValueError):
            write_json(out, {"x": value})
    assert json.loads(out.read_text()) == {"x": None} and list(tmp_path.iterdir()) == [out]


def test_decimals() -> None:
    assert decimals("1,1.5,2") == (1.0, 1.5, 2.0)


def test_widths_may_repeat() -> None:
    assert widths("64,128,128") == (64, 128, 128)
