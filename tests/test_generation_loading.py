"""From configuration to generator: every misfit is named, and the bundled generators are what they say."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_generation_support import refused, tiny_generator

from fbl_flower.config import parse_config
from fbl_flower.config.sections import GeneratorConfig
from fbl_flower.data.datasets import load_parts
from fbl_flower.data.readers.download import DEBIAN_FASHION_MNIST
from fbl_flower.errors import ConfigError, GeneratorError
from fbl_flower.generation.diffusion import DiffusionGenerator
from fbl_flower.generation.loading import (
    bundled_generator,
    check_generator,
    check_generator_files,
    generator_folder,
    load_generator,
    sampling_of,
)
from fbl_flower.generation.public import PublicImages
from fbl_flower.generation.quantization import WEIGHTS
from fbl_flower.generation.recipe import check_files, file_sha256, read_info, write_sampling
from fbl_flower.generation.sampling_defaults import Sampling, parse_sampling, resolve_sampling


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def configure(folder, **keys):
    base = {"data.name": "digits", "data.num-private": 500, "generator.path": str(folder)}
    config = parse_config(base | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})
    return config, load_parts(config.data)


def test_the_configured_generator_is_loaded(folder):
    config, parts = configure(folder, generator__steps=3, generator__batch_size=5)
    assert check_generator(config, parts) == []
    generator = load_generator(config, parts)
    assert isinstance(generator, DiffusionGenerator)
    direct = DiffusionGenerator.load(folder, steps=3, guidance=1.5, batch_size=5)
    assert generator.fingerprint == direct.fingerprint
    assert torch.equal(generator.generate([1], [2]), direct.generate([1], [2]))


def put_sampling(folder, entry):
    """Write an entry `sampling` into a recipe; text is put there as it is, for what no JSON writer writes."""
    raw = json.loads((folder / "recipe.json").read_text())
    text = entry if isinstance(entry, str) else json.dumps(entry)
    (folder / "recipe.json").write_text(json.dumps(raw | {"sampling": "HERE"}).replace('"HERE"', text))


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({}, Sampling(steps=6, guidance=3.0)),
        ({"generator__steps": 2}, Sampling(steps=2, guidance=3.0)),
        ({"generator__guidance": 1.0}, Sampling(steps=6, guidance=1.0)),
        ({"generator__steps": 6, "generator__guidance": 3.0}, Sampling(steps=6, guidance=3.0)),
    ],
)
def test_settings_of_zero_are_the_generators_own(folder, settings, used):
    put_sampling(folder, {"steps": 6, "guidance": 3, "chosen_on": {"judge_accuracy": 0.9}})
    config, parts = configure(folder, **settings)
    assert sampling_of(config, parts) == used
    direct = DiffusionGenerator.load(folder, steps=used.steps, guidance=used.guidance, batch_size=32)
    assert load_generator(config, parts).fingerprint == direct.fingerprint


def test_a_recipe_of_an_earlier_version_means_8_steps_at_1_5(folder):
    assert "sampling" not in json.loads((folder / "recipe.json").read_text()) and read_info(folder).sampling is None
    config, parts = configure(folder)
    assert sampling_of(config, parts) == Sampling(steps=8, guidance=1.5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"steps": 0, "guidance": 2.0}, "sampling: steps: expected a whole number from 1 to 1000, got 0"),
        ({"steps": 4.0, "guidance": 2.0}, "sampling: steps: expected a whole number from 1 to 1000, got 4.0"),
        ({"steps": True, "guidance": 2.0}, "sampling: steps: expected a whole number from 1 to 1000, got True"),
        ('{"steps": 4, "guidance": NaN}', "sampling: guidance: expected a number from 1 to 20, got nan"),
        ('{"steps": 4, "guidance": 1e999}', "sampling: guidance: expected a number from 1 to 20, got inf"),
        ({"steps": 4, "guidance": "2"}, "sampling: guidance: expected a number from 1 to 20, got '2'"),
        ({"steps": 4, "guidance": 0.5}, "sampling: guidance: expected a number from 1 to 20, got 0.5"),
        ('{"steps": 4, "guidance": 2, "chosen_on": {"x": NaN}}', "sampling: chosen_on: expected a JSON object"),
        ({"steps": 4, "guidance": 2, "chosen_on": [1]}, "sampling: chosen_on: expected a JSON object"),
        ({"steps": 4}, "sampling: expected an object with steps, guidance and chosen_on"),
        ({"steps": 4, "guidance": 2, "stpes": 8}, "sampling: expected an object with steps, guidance and chosen_on"),
        ([4, 2.0], "sampling: expected an object with steps, guidance and chosen_on"),
        ({}, "sampling: expected an object with steps, guidance and chosen_on"),
    ],
)
def test_a_bad_sampling_entry_names_the_file(folder, entry, message):
    put_sampling(folder, entry)
    refused(*configure(folder), f"generator: {folder / 'recipe.json'}: {message}", "delete it and run")


def test_a_chosen_sampling_is_written_and_read_again(folder):
    info, before = read_info(folder), json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").chmod(0o640)
    chosen = Sampling(steps=5, guidance=1.25, chosen_on={"candidates": [{"accuracy": 0.5}]})
    write_sampling(folder, chosen, measured=info)
    assert read_info(folder).sampling == chosen and (folder / "recipe.json").stat().st_mode & 0o777 == 0o640
    after = json.loads((folder / "recipe.json").read_text())
    assert after.pop("sampling") == dataclasses.asdict(chosen) and after == before
    assert [file.name for file in folder.iterdir() if file.name.endswith(".part")] == []
    quantised_elsewhere = dataclasses.replace(info, files=dict(info.files) | {WEIGHTS: "0" * 64})
    with pytest.raises(GeneratorError, match=f"{folder} has changed since it was measured"):
        write_sampling(folder, chosen, measured=quantised_elsewhere)


@given(steps=st.integers(1, 1000), guidance=st.floats(1, 20))
def test_every_allowed_sampling_survives_a_recipe(steps, guidance):
    sampling = Sampling(steps=steps, guidance=guidance)
    assert parse_sampling(json.loads(json.dumps(dataclasses.asdict(sampling)))) == sampling
    assert resolve_sampling(GeneratorConfig(steps=steps, guidance=guidance), Sampling(steps=1, guidance=1.0)) == sampling


def test_text_to_image_has_defaults_of_its_own():
    settings = GeneratorConfig(name="text-to-image")
    assert resolve_sampling(settings, None) == Sampling(steps=8, guidance=2.0)
    assert resolve_sampling(dataclasses.replace(settings, steps=1, guidance=1.0), None) == Sampling(steps=1, guidance=1.0)


@pytest.mark.parametrize("guidance", [0.5, 0.999, 1e-9])
def test_a_guidance_between_zero_and_one_is_refused(guidance):
    with pytest.raises(ConfigError, match=r"generator.guidance: expected 0 \(the generator's own\) or 1 to 20, got"):
        parse_config({"generator.guidance": guidance})


def test_a_missing_folder(folder):
    refused(*configure(folder / "gone"), f"no folder at {folder / 'gone'}", "correct generator.path")
    name = "a" * 300
    refused(*configure(folder / name), f"generator.path: {folder / name} cannot be read (File name too long); correct it")
    assert check_generator_files(configure(folder / name)[0])[0].startswith("generator.path: ")


def test_a_folder_of_something_else(tmp_path):
    refused(*configure(tmp_path), f"{tmp_path} holds no recipe.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 2}'])
def test_a_damaged_recipe(folder, text):
    (folder / "recipe.json").write_text(text)
    refused(*configure(folder), f"{folder / 'recipe.json'} is damaged", "copy or train the generator again")


@pytest.mark.parametrize(
    "change",
    [{"image_size": "8"}, {"files": {}}, {"files": ["config.json"]}, {"training": {}}, {"class_names": None}, {"surprise": 1}],
)
def test_a_recipe_with_a_wrong_entry(folder, change):
    raw = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(raw | change))
    refused(*configure(folder), f"{folder / 'recipe.json'} is damaged")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "quanto_qmap.json"])
def test_a_damaged_or_missing_file(folder, name):
    blob = bytearray((folder / name).read_bytes())
    blob[len(blob) // 2] ^= 1
    (folder / name).write_bytes(blob)
    refused(*configure(folder), f"{folder / name} is damaged: its sha256 is")
    (folder / name).unlink()
    refused(*configure(folder), f"{folder / name} is missing")
    with pytest.raises(GeneratorError, match=f"{name} is missing"):
        DiffusionGenerator.load(folder, steps=2, guidance=1.0, batch_size=2)


def test_a_generator_of_another_data_set_with_all_its_misfits(folder):
    refused(
        *configure(folder, data__name="mnist5k", data__num_private=2000),
        f"generator.trained-on: {folder} was trained on digits; wanted mnist5k",
        "makes images of 1 x 8 x 8 (channels, height, width); the data set has 1 x 28 x 28; correct data.image-size",
    )


def test_a_generator_of_another_data_set_on_purpose(folder):
    config, parts = configure(
        folder, data__name="mnist5k", data__image_size=8, data__num_private=2000, generator__trained_on="digits"
    )
    assert check_generator(config, parts) == []
    assert load_generator(config, parts).generate([0], [0]).shape == (1, 1, 8, 8)


def test_a_generator_that_is_not_what_trained_on_says(folder):
    refused(*configure(folder, generator__trained_on="mnist5k"), "was trained on digits; wanted mnist5k")


def test_another_public_part_may_have_seen_test_images(folder):
    refused(*configure(folder, data__num_test=300), "trained on another public part of digits", "may have seen test images")


def test_another_number_of_classes(folder):
    config, parts = configure(folder)
    nine = dataclasses.replace(parts, info=dataclasses.replace(parts.info, class_names=parts.info.class_names[:9]))
    refused(config, nine, f"{folder} knows 10 classes; the data set has 9")


def test_classes_in_another_order_would_be_filled_with_each_others_images(folder):
    config, parts = configure(folder)
    names = parts.info.class_names
    for others in (names[::-1], tuple(f"{name}!" for name in names)):
        other = dataclasses.replace(parts, info=dataclasses.replace(parts.info, class_names=others, name="own folder"))
        refused(
            config,
            other,
            f"{folder} was trained on the classes {', '.join(names)}, in this order; the federation's are {others[0]}",
        )


def test_a_network_that_cannot_be_built_is_one_error(folder):
    """With sums that match: whoever wrote it meant it."""
    (folder / "config.json").write_text('{"block_out_channels": [32, 64], "down_block_types": ["DownBlock2D"]}')
    raw = json.loads((folder / "recipe.json").read_text())
    raw["files"]["config.json"] = file_sha256(folder / "config.json")
    (folder / "recipe.json").write_text(json.dumps(raw))
    config, parts = configure(folder)
    with pytest.raises(
        GeneratorError, match=r"does not fit the network beside it: that cannot be built \(ValueError: "
    ) as caught:
        load_generator(config, parts).generate([0], [0])
    assert "\n" not in str(caught.value)


def test_a_file_is_read_for_its_sum_once_and_again_when_it_was_changed(folder, monkeypatch):
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, name: read.append(stream.name) or digest(stream, name))
    info, weights = read_info(folder), folder / "quanto_model.safetensors"
    assert check_files(folder, info) == check_files(folder, info) == []
    assert sorted(read) == sorted(str(folder / name) for name in info.files)
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1  # the size stays
    weights.write_bytes(changed)
    assert "damaged" in check_files(folder, info)[0]
    assert read[len(info.files) :] == [str(weights)]


def test_no_bundled_generator_for_these_images():
    refused(
        *configure("", data__image_size=12, generator__name="diffusion"),
        "no generator comes with the package for digits-12px (it has digits-28px, digits-8px, fashion-mnist-28px, mnist5k-28px)",
        'generator.name = "public-images"',
    )


def test_public_images_need_an_image_of_each_class():
    config, parts = configure("", generator__name="public-images")
    assert check_generator(config, parts) == []
    assert isinstance(load_generator(config, parts), PublicImages)
    keep = torch.nonzero((parts.public.labels != 2) & (parts.public.labels != 6)).flatten()
    refused(config, dataclasses.replace(parts, public=parts.public.take(keep)), "no public image of two, six")


def test_checking_is_cheap():
    script = (
        "import sys; from fbl_flower.config import parse_config; from fbl_flower.data.datasets import load_parts;"
        "from fbl_flower.generation.loading import check_generator; from fbl_flower.generation import cache, protocol, quality;"
        "c = parse_config({'data.name': 'digits', 'data.num-private': 500}); assert check_generator(c, load_parts(c.data)) == [];"
        "print([name for name in ('diffusers', 'optimum', 'transformers', 'accelerate') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("name", "size"), [("mnist5k", 28), ("digits", 28), ("digits", 8), ("fashion-mnist", 28)])
def test_a_bundled_generator_is_what_it_says_and_draws_its_classes(name, size):
    path = DEBIAN_FASHION_MNIST if name == "fashion-mnist" else None
    if path is not None and not path.is_dir():
        pytest.skip("no Fashion-MNIST: Debian's package dataset-fashion-mnist has it")
    config, parts = configure("", data__name=name, data__path=str(path or ""), data__image_size=size)
    folder = generator_folder(config, parts)
    assert folder == bundled_generator(name, size)
    info = read_info(folder)
    assert check_files(folder, info) == []
    assert (info.data_name, info.image_size, info.public_sha256) == (name, size, parts.public_sha256)
    assert info.num_images == len(parts.public)
    assert 100_000 < sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    generator = load_generator(config, parts)
    labels = torch.arange(10).repeat(20)
    images = generator.generate(labels.tolist(), list(range(200)))
    assert images.dtype == torch.uint8 and images.shape == (200, 1, size, size)
    real = parts.public.images.flatten(1).float()
    means = torch.stack([real[parts.public.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(images.flatten(1).float(), means).argmin(1)
    # chance is 0.1; real test images reach 0.78 (mnist5k), 0.89 (digits) and 0.68 (fashion-mnist) by this crude measure
    assert (nearest == labels).float().mean() >= 0.5
