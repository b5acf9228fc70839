"""Stable Diffusion in few bits: made once, loaded bit for bit, and a generator like any other. The weights are random."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_pipelines import configure, load, save_tiny_decoder
from test_generation_support import read_only_install

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.loading import load_generator
from fbl_flower.generation.pipeline_store import quantize_pipeline
from fbl_flower.generation.quantization import LAYERS, WEIGHTS
from fbl_flower.generation.text_to_image import TextToImageGenerator
from fbl_flower.generation.text_to_image_recipe import read_pipeline_info
from fbl_flower.seeding import derive

LABELS, SEEDS = [3, 1, 4, 1, 5], [10, 11, 2**63 - 1, 13, 0]


@pytest.fixture(scope="module")
def generator(small_made) -> TextToImageGenerator:
    return load(small_made)


def like(generator: TextToImageGenerator, **settings) -> TextToImageGenerator:
    """Return a generator with the same models and other settings."""
    return TextToImageGenerator(
        lambda: generator._components, generator._own_scheduler, generator.info, generator._target,
        dataclasses.replace(generator._settings, **settings), device="cpu",
    )  # fmt: skip


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- the folder


def test_the_folder_says_what_it_is_and_holds_no_pickle(small_source, small_made):
    info = read_pipeline_info(small_made)
    assert (info.source, info.revision, info.weights, info.dtype) == (small_source.name, "", "4bit", "bf16")
    assert info.float_layers == ("conv_in", "conv_out")
    assert (info.resolution, info.vae_scale) == (16, 2)  # latents of 8 x 8, and an autoencoder that halves once
    assert info.components["unet"] == "UNet2DConditionModel" and info.components["scheduler"] == "DDIMScheduler"
    files = {file.relative_to(small_made).as_posix() for file in small_made.rglob("*") if file.is_file()}
    assert files == info.files.keys() | {"recipe.json"}
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".txt"}
    assert info.files["unet/config.json"] == hashlib.sha256((small_made / "unet" / "config.json").read_bytes()).hexdigest()


def test_what_is_quantised_and_what_stays_in_float(small_source, small_made):
    layers = json.loads((small_made / "unet" / LAYERS).read_text())
    assert "conv_in" not in layers and "conv_out" not in layers
    assert layers["mid_block.resnets.0.conv1"]["weights"] == layers["mid_block.attentions.0.proj_in"]["weights"] == "qint4"
    stored = load_file(small_made / "unet" / WEIGHTS)
    whole = load_file(small_source / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(stored["conv_in.weight"], whole["conv_in.weight"].bfloat16())
    text = json.loads((small_made / "text_encoder" / LAYERS).read_text())
    assert len(text) == 12  # 2 layers with q, k, v, out and two of the perceptron
    assert not (small_made / "vae" / LAYERS).exists()


def test_fewer_bits_take_less_space(small_source, small_made, tmp_path):
    for weights in ("8bit", "none"):
        quantize_pipeline(str(small_source), tmp_path / weights, weights=weights)
    sizes = [size_of(folder / "unet") for folder in (small_made, tmp_path / "8bit", tmp_path / "none")]
    num = read_pipeline_info(small_made).num_parameters["unet"]
    # per weight: 4 bits and its share of the scales, 8 bits, 16 bits
    assert 0.5 * num < sizes[0] < 0.75 * num < sizes[1] < 1.25 * num < 2 * num < sizes[2] < 2.1 * num
    exact = load(tmp_path / "none").generate(LABELS, SEEDS).float()
    distances = [(load(f).generate(LABELS, SEEDS) - exact).abs().mean() for f in (tmp_path / "8bit", small_made)]
    assert 0 < distances[0] < distances[1]


def test_the_tiny_decoder_replaces_the_autoencoder(small_source, tmp_path):
    tiny_decoder = save_tiny_decoder(tmp_path / "decoder")
    info = quantize_pipeline(str(small_source), tmp_path / "sd", tiny_decoder=str(tiny_decoder))
    assert info.components["vae"] == "AutoencoderTiny" and info.tiny_decoder == "decoder"
    assert load(tmp_path / "sd").generate([1], [2]).shape == (1, 1, 8, 8)


@pytest.mark.slow  # three processes import two large libraries
@pytest.mark.parametrize(("dtype", "lacking"), [("bf16", "compiler"), ("fp32", "compiler"), ("bf16", "write permission")])
def test_two_fresh_processes_on_lean_machines_make_the_same_images(small_source, small_made, tmp_path, dtype, lacking):
    folder = small_made if dtype == "bf16" else tmp_path / "fp32"
    if dtype == "fp32":
        quantize_pipeline(str(small_source), folder, dtype="fp32")
    script = (
        "import sys, hashlib, torch; torch.set_num_threads(int(sys.argv[2])); sys.path.insert(0, sys.argv[3]);"
        "import small_pipelines as t, test_text_to_image as u; g = t.load(sys.argv[1]);"
        "print(g.fingerprint, hashlib.sha256(g.generate(u.LABELS, u.SEEDS).numpy().tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", script, str(folder), str(torch.get_num_threads()), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    if lacking == "compiler":
        environment["PATH"] = "/nonexistent"
    else:
        command = [*read_only_install(), *command]
    there = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    here = load(folder)
    digest = hashlib.sha256(here.generate(LABELS, SEEDS).numpy().tobytes()).hexdigest()
    for process in there:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.split() == [here.fingerprint, digest]


# --- the generator


def test_images_have_the_promised_type_and_shape(generator):
    images = generator.generate(LABELS, SEEDS)
    assert images.dtype == torch.uint8 and images.shape == (5, 1, 8, 8)
    assert images.float().std() > 10
    assert generator.generate([], []).shape == (0, 1, 8, 8)
    assert generator.num_blank == 0


@pytest.mark.parametrize("scheduler", ["auto", "dpm++", "unipc", "lcm", "euler", "euler-ancestral", "ddim"])
def test_an_image_depends_on_its_label_and_seed_alone(generator, scheduler):
    """Also where the scheduler draws noise of its own (lcm, euler-ancestral), and whatever the global generator does."""
    generator = like(generator, scheduler=scheduler, steps=3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = generator.generate(LABELS, SEEDS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(generator.generate([5, 4], [0, 2**63 - 1]), whole[[4, 2]])
    assert len({image.numpy().tobytes() for image in [*whole, *generator.generate([3, 3, 4], [8, 9, 10])]}) == 8


def test_the_label_decides_the_image(generator):
    """The texts of random weights say little; strong guidance lets it be seen. One seed means one noise and one template."""
    images = like(generator, guidance=8.0, resolution=64).generate(list(range(10)), [5] * 10)
    assert len({image.numpy().tobytes() for image in images}) == 10


def test_threads_may_share_a_generator(generator):
    alone = [generator.generate(LABELS, [seed + i for seed in (1, 2, 3, 4, 5)]) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: generator.generate(LABELS, [seed + i for seed in (1, 2, 3, 4, 5)]), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_colours_and_the_size_of_the_data_set(small_made):
    config, parts = configure(small_made)
    parts = dataclasses.replace(parts, image_size=12, info=dataclasses.replace(parts.info, channels=3))
    images = load_generator(config, parts).generate([1], [2])
    assert images.shape == (1, 3, 12, 12) and not torch.equal(images[:, 0], images[:, 1])


def test_another_resolution(generator):
    large = like(generator, resolution=32)
    assert large._batch([1] * 4, [2] * 4, None).shape == (4, 3, 32, 32)
    assert large.generate([1], [2]).shape == (1, 1, 8, 8)


def test_reduction_by_hand(generator):
    """8 x 8 from 16 x 16: of a checkerboard of 2 x 2 squares all that stays is grey; of grey, the mean of the channels."""
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    pixels = torch.stack([board, board, board]).float()[None]
    assert ((generator._reduced(pixels).float() - 127.5).abs() <= 16).all()  # 255 or 0 without antialiasing
    flat = torch.tensor([0.1, 0.2, 0.6])[None, :, None, None].expand(1, 3, 16, 16)
    assert generator._reduced(flat).unique().tolist() == [round(0.3 * 255)]


def test_guidance_one_makes_no_second_evaluation(generator, monkeypatch):
    calls, unet = [], generator._components["unet"]
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda x, *a, **k: (calls.append(len(x)), forward(x, *a, **k))[1])
    for guidance in (1.0, 2.0):
        like(generator, guidance=guidance).generate([1], [2])
    one = [1]  # measures the memory that an image takes
    assert calls == [*one, 4, 4, *one, 8, 8]  # whole batches of 4; with guidance, with and without the text


def test_the_fingerprint_covers_what_decides_the_pixels(generator, small_made):
    changes = [{}, {"steps": 3}, {"guidance": 1.5}, {"batch_size": 5}, {"scheduler": "euler"}, {"resolution": 24}]
    prints = [like(generator, **change).fingerprint for change in changes]
    prints.append(load(small_made, generator__prompt="{name}").fingerprint)
    other = dataclasses.replace(generator.info, files={**generator.info.files, "unet/config.json": "0" * 64})
    settings = (generator._target, generator._settings)
    prints.append(TextToImageGenerator(dict, generator._own_scheduler, other, *settings, device="cpu").fingerprint)
    assert len(set(prints)) == len(prints)
    elsewhere = like(generator, strength=0.7)
    assert elsewhere.fingerprint == prints[0] == load(small_made).fingerprint
    assert elsewhere.image_fingerprint != generator.image_fingerprint


@pytest.mark.parametrize("spoilt", [0.0, 1.0, float("nan"), float("inf")])
def test_a_blank_image_is_made_once_more_from_another_seed(generator, monkeypatch, caplog, spoilt):
    generator, labels, seeds, again = like(generator), [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], derive(2, "again")
    expected, second = generator.generate(labels, seeds), generator.generate([2], [again])[0]
    intact, asked, bad = generator._batch, [], {2}

    def batch(labels, seeds, sources):
        asked.append(seeds)
        pixels = intact(labels, seeds, sources)
        pixels[[seed in bad for seed in seeds]] = spoilt
        return pixels

    monkeypatch.setattr(generator, "_batch", batch)
    images = generator.generate(labels, seeds)
    assert asked == [[1, 2, 3, 4], [5, 0, 0, 0], [again, 0, 0, 0]]
    assert torch.equal(images[[0, 2, 3, 4]], expected[[0, 2, 3, 4]]) and torch.equal(images[1], second)
    assert generator.num_blank == 0 and not caplog.records
    bad.add(again)
    assert len(generator.generate(labels, seeds)[1].unique()) == 1
    assert generator.num_blank == 1
    assert "1 of 5 images are blank" in caplog.text


@pytest.mark.parametrize(
    ("labels", "seeds", "message"),
    [([10], [0], "got the label 10"), ([0], [-1], "got the seed -1"), ([0, 1], [0], "got 2 labels and 1 seeds")],
)
def test_impossible_requests_are_refused(generator, labels, seeds, message):
    with pytest.raises(GeneratorError, match=message):
        generator.generate(labels, seeds)
