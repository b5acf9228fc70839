"""What is refused, with the file, key or source by name; and the prompts."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import quick
from safetensors.torch import load_file, save_file
from small_pipelines import configure, load, save_index, save_tiny_decoder
from test_generation_support import refused

from fbl_flower.claim import Claim
from fbl_flower.cli import main
from fbl_flower.config import parse_config
from fbl_flower.data.datasets import DATASETS
from fbl_flower.errors import ConfigError, GeneratorError
from fbl_flower.generation import pipeline_store
from fbl_flower.generation.components import FLOAT_WEIGHTS
from fbl_flower.generation.loading import bundled_generator, load_generator
from fbl_flower.generation.pipeline_store import quantize_pipeline
from fbl_flower.generation.prompts import make_prompts
from fbl_flower.generation.quantization import LAYERS, WEIGHTS
from fbl_flower.generation.recipe import file_sha256


@pytest.fixture
def source(small_source, tmp_path) -> Path:
    return shutil.copytree(small_source, tmp_path / "source")


@pytest.fixture
def folder(small_made, tmp_path) -> Path:
    return shutil.copytree(small_made, tmp_path / "copy")


def reseal(folder: Path, name: str) -> None:
    """Let the recipe agree with a changed file, as if somebody had made the folder so."""
    raw = json.loads((folder / "recipe.json").read_text())
    raw["files"][name] = file_sha256(folder / name)
    (folder / "recipe.json").write_text(json.dumps(raw))


# --- loading


def test_the_wrong_kind_of_folder(folder, small_source, tmp_path):
    refused(*configure(tmp_path / "gone"), f"no folder at {tmp_path / 'gone'}", "fbl-flower generator quantize SOURCE")
    (tmp_path / "empty").mkdir()
    refused(*configure(tmp_path / "empty"), f"{tmp_path / 'empty'} holds no recipe.json")
    refused(*configure(small_source), f"{small_source} is a pipeline in full precision", "generator quantize")
    bundled = bundled_generator("digits", 8)
    refused(*configure(bundled), f"{bundled} is a class-conditional generator", 'generator.name = "diffusion"')
    refused(*configure(folder, generator__name="diffusion"), f"{folder} is of the kind text-to-image; set generator.name")


@pytest.mark.parametrize("name", [f"unet/{WEIGHTS}", f"unet/{LAYERS}", "unet/config.json", f"vae/{FLOAT_WEIGHTS}",
                                  "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"])  # fmt: skip
def test_a_truncated_or_missing_file(folder, name):
    blob = (folder / name).read_bytes()
    (folder / name).write_bytes(blob[: len(blob) // 2])
    refused(*configure(folder), f"{folder / name} is damaged: its sha256 is", "generator quantize")
    (folder / name).unlink()
    refused(*configure(folder), f"{folder / name} is missing")


def test_a_foreign_file(folder):
    (folder / "tokenizer" / "added_tokens.json").write_text("{}")
    refused(*configure(folder), f"{folder / 'tokenizer' / 'added_tokens.json'} is foreign")


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"weights": "2bit"}, {"components": {}}, {"resolution": "16"}, {"files": {"../x": "0"}}, {"surprise": 1}, {"files": {}}],
)  # fmt: skip
def test_a_wrong_recipe(folder, change):
    raw = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(raw | change))
    refused(*configure(folder), f"{folder / 'recipe.json'} is damaged", "generator quantize")


def test_another_class_in_the_recipe(folder):
    raw = json.loads((folder / "recipe.json").read_text())
    raw["components"]["unet"] = "UNet2DModel"
    (folder / "recipe.json").write_text(json.dumps(raw))
    refused(*configure(folder), "unet: got the class 'UNet2DModel'; wanted UNet2DConditionModel")


def test_weights_for_another_architecture(folder):
    name = f"unet/{WEIGHTS}"
    state = load_file(folder / name)
    save_file({key: value for key, value in state.items() if not key.startswith("mid_block")}, folder / name)
    reseal(folder, name)
    with pytest.raises(GeneratorError, match=f"{WEIGHTS} does not fit the network"):
        load_generator(*configure(folder)).generate([0], [0])


def test_float_weights_for_another_architecture(folder):
    name = f"vae/{FLOAT_WEIGHTS}"
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, folder / name)
    reseal(folder, name)
    with pytest.raises(GeneratorError, match=f"{FLOAT_WEIGHTS} does not fit the network"):
        load_generator(*configure(folder)).generate([0], [0])


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"])
def test_a_sealed_file_that_makes_no_sense(folder, name):
    (folder / name).write_text('{"down_block_types": ["Nothing"], "beta_schedule": "nothing"}')
    reseal(folder, name)
    with pytest.raises(GeneratorError, match=f"{folder / Path(name).parent}"):
        load_generator(*configure(folder)).generate([0], [0])


def test_models_are_loaded_with_the_first_image(folder, monkeypatch):
    """A client whose images are all on disk starts as a new process every round: it needs the fingerprint only."""
    monkeypatch.setattr("fbl_flower.generation.text_to_image.load_component", lambda *_, **__: pytest.fail("loaded"))
    generator = load_generator(*configure(folder))
    assert len(generator.fingerprint) == 64 and len(generator.generate([], [])) == 0
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        generator.generate([0], [0])


def test_settings_that_do_not_fit_the_model(folder):
    refused(*configure(folder, generator__resolution=8, data__name="mnist5k"), "8 pixels are smaller than the data set's 28")
    with pytest.raises(GeneratorError, match="generator.steps: got 900, which LCMScheduler cannot make"):
        load_generator(*configure(folder, generator__scheduler="lcm", generator__steps=900))


def test_settings_that_are_wrong_by_themselves():
    keys = quick(
        Path("/nowhere"), generator__name="text-to-image", generator__resolution=100, generator__scheduler="best",
        generator__strength=0.0,
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        parse_config(keys)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "generator.scheduler", "generator.strength", "generator.path", "generator.resolution",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="generator.image-to-image: true, but generator.name is 'public-images'"):
        parse_config(quick(Path("/nowhere")) | {"generator.image-to-image": True})


def test_checking_is_cheap(folder):
    script = (
        "import sys; from fbl_flower.config import parse_config; from fbl_flower.data.datasets import load_parts;"
        "from fbl_flower.generation.loading import check_generator;"
        "c = parse_config({'data.name': 'digits', 'data.num-private': 500, 'generator.name': 'text-to-image',"
        "'generator.path': sys.argv[1]}); assert check_generator(c, load_parts(c.data)) == [];"
        "print([name for name in ('diffusers', 'optimum', 'transformers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- quantising


def fails(source: Path | str, out: Path, *messages: str, **options) -> None:
    with pytest.raises(GeneratorError) as caught:
        quantize_pipeline(str(source), out, **options)
    for message in messages:
        assert message in str(caught.value)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}-*"))


def test_a_directory_that_is_no_pipeline(tmp_path, source):
    out = tmp_path / "sd"
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", out, f"{tmp_path / 'empty'} is no pipeline: its model_index.json is missing or damaged")
    (source / "model_index.json").write_text("{")
    fails(source, out, f"{source} is no pipeline")
    fails(tmp_path / "gone", out, f"no directory at {tmp_path / 'gone'}")


def test_another_family_is_named(tmp_path, source):
    save_index(source, _class_name="StableDiffusionXLPipeline", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    fails(source, tmp_path / "sd", "is StableDiffusionXLPipeline", "text_encoder_2: CLIPTextModelWithProjection")
    save_index(source, unet=["diffusers", "SD3Transformer2DModel"])
    fails(source, tmp_path / "sd", "unet: SD3Transformer2DModel", "wanted unet: UNet2DConditionModel")
    save_index(source, scheduler="AutoencoderKL2")
    fails(source, tmp_path / "sd", "the class AutoencoderKL2 is no model and no scheduler")


def test_a_damaged_source(tmp_path, source):
    file = source / "unet" / "diffusion_pytorch_model.safetensors"
    blob = file.read_bytes()
    file.write_bytes(blob[:1000])
    fails(source, tmp_path / "sd", f"{source}/unet cannot be loaded as UNet2DConditionModel")
    file.write_bytes(blob)
    state = load_file(file)
    save_file({name: value for name, value in state.items() if name != "conv_in.weight"}, file)
    fails(source, tmp_path / "sd", f"{source}/unet lacks 1 weights of its own configuration, such as conv_in.weight")


def test_pickled_weights_are_not_read(tmp_path, source):
    file = source / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    fails(source, tmp_path / "sd", f"{source}/vae cannot be loaded as AutoencoderKL from safetensors")


def test_components_that_do_not_fit_each_other(tmp_path, source):
    from diffusers import AutoencoderTiny

    AutoencoderTiny(
        latent_channels=8, encoder_block_out_channels=(32, 32), decoder_block_out_channels=(32, 32), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "decoder")  # fmt: skip
    fails(source, tmp_path / "sd", "it has 4 latent channels, and the autoencoder 8", tiny_decoder=str(tmp_path / "decoder"))
    fails(source, tmp_path / "sd", "cannot be loaded as AutoencoderTiny", tiny_decoder=str(source))


def test_a_unet_that_needs_more_than_a_text_is_refused(tmp_path, source):
    """Such models quantise well, and fail with the first image: Stable Diffusion XL's, and those of classes."""
    file = source / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"class_embed_type": "identity"}))
    fails(source, tmp_path / "sd", "does not fit: it needs more than a text (class_embed_type: identity)")


def test_a_tokenizer_of_another_text_encoder_is_refused(tmp_path, source):
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    CLIPTextModel(CLIPTextConfig(vocab_size=100, **sizes)).save_pretrained(source / "text_encoder")
    fails(
        source, tmp_path / "sd", f"the text encoder of {source} knows 100 tokens, and its tokenizer 514; give a whole pipeline"
    )


def test_a_prompt_that_the_model_would_read_only_in_part_is_refused(folder):
    """The tokenizer here has a token for each letter, and 77 places: start, 70 words of one letter, "three" and its like, end."""
    fits, too_long = ("b " * 70 + "{name}", "b " * 71 + "{name}")
    assert load(folder, generator__prompt=fits).generate([0], [0]).shape[0] == 1
    generator = load(folder, generator__prompt=too_long)
    with pytest.raises(GeneratorError, match=r"'b b .* has 78 tokens, and the model reads 77; shorten it"):
        generator.generate([0], [0])


def test_what_a_kill_left_behind_is_removed_and_what_another_process_makes_is_not(tmp_path, source):
    killed, under_way = tmp_path / ".sd-abcdefgh", tmp_path / ".sd-hgfedcba"
    for left in (killed, under_way, tmp_path / ".sd-other-one"):
        left.mkdir()
    claim = Claim(under_way, patience=0.0)
    quantize_pipeline(str(source), tmp_path / "sd")
    claim.release()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".sd-hgfedcba", ".sd-other-one", "sd", "source"]


def test_what_is_there_already_stays(tmp_path, source):
    out = tmp_path / "sd"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(GeneratorError, match=f"{out} is there already"):
        quantize_pipeline(str(source), out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("weights", ["4bit", "none"])
def test_a_full_disk(tmp_path, source, weights):
    """A limit on the size of a file fails the write of the UNet as a full disk does, after the smaller files were written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, before[1]))
    try:
        fails(source, tmp_path / "sd", f"{tmp_path / 'sd'} cannot be written", "free space", weights=weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_command(*arguments: Path | str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `fbl-flower generator quantize` in a process of its own: the hub's client reads its environment once, at import."""
    command = [sys.executable, "-m", "fbl_flower.cli", "generator", "quantize", *map(str, arguments), "--threads", "1"]
    whole = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    return subprocess.run(command, env=whole, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_name_without_network(tmp_path, offline):
    done = run_command("somebody/some-model", tmp_path / "sd", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE=offline)
    assert done.returncode == 2
    assert "somebody/some-model cannot be read from the hub" in done.stderr and "give the local directory" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_hub_name_is_read_at_one_commit(tmp_path, small_source):
    """The hub's cache on disk, laid out by hand, stands for the hub."""
    commit, model = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--somebody--small"
    shutil.copytree(small_source, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    for revision in ([], ["--revision", commit]):
        out = tmp_path / f"sd{len(revision)}"
        done = run_command(
            "somebody/small", out, "--full-decoder", *revision, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"
        )
        assert done.returncode == 0, done.stderr
        recipe = json.loads((out / "recipe.json").read_text())
        assert (recipe["source"], recipe["revision"]) == ("somebody/small", commit)


@pytest.mark.parametrize("component", ["tokenizer", "unet"])
def test_an_interruption_leaves_nothing(tmp_path, source, monkeypatch, component):
    read = pipeline_store.read_source

    def interrupted(source, name, *rest, **more):
        if name == component:
            raise KeyboardInterrupt
        return read(source, name, *rest, **more)

    monkeypatch.setattr(pipeline_store, "read_source", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_pipeline(str(source), tmp_path / "sd")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_full_decoder_is_replaced_unless_told_otherwise(tmp_path, source, monkeypatch):
    monkeypatch.setattr(pipeline_store, "_TINY_DECODER", str(save_tiny_decoder(tmp_path / "taesd")))
    info = quantize_pipeline(str(source), tmp_path / "sd", tiny_decoder="auto")
    assert (info.components["vae"], info.tiny_decoder) == ("AutoencoderTiny", "taesd")
    monkeypatch.setattr(pipeline_store, "_TINY_DECODER", str(tmp_path / "gone"))
    messages = "cannot be loaded as AutoencoderTiny", "; or give --tiny-decoder DIR, or --full-decoder"
    fails(source, tmp_path / "sd2", *messages, tiny_decoder="auto")


def test_an_index_that_is_no_object(tmp_path, source):
    (source / "model_index.json").write_text("[]")
    fails(source, tmp_path / "sd", "is no pipeline: its model_index.json is")


def test_the_command(tmp_path, source, capsys):
    out, decoder = tmp_path / "sd", save_tiny_decoder(tmp_path / "decoder")
    command = [
        "generator",
        "quantize",
        str(source),
        str(out),
        "--weights",
        "8bit",
        "--tiny-decoder",
        str(decoder),
        "--threads",
        "1",
    ]
    assert main(command) == 0
    assert "weights in" in capsys.readouterr().out
    assert json.loads((out / "recipe.json").read_text())["weights"] == "8bit"
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["generator", "quantize", str(source), str(out), "--threads", "0"]) == 2
    assert main(["generator", "quantize", str(source), str(tmp_path / "x"), "--revision", "main"]) == 2
    assert "has no revisions" in capsys.readouterr().err


# --- prompts


def test_the_seed_chooses_the_template_and_the_class_its_word():
    prompts = make_prompts("cifar10", DATASETS["cifar10"].class_names, "")
    texts = {prompts.text(4, seed) for seed in range(60)}
    assert texts == {template.replace("{name}", "deer, animal") for template in prompts.templates}
    assert prompts.text(4, 5) == prompts.text(4, 5)
    assert "car" in prompts.names and "lorry truck" in prompts.names and "automobile" not in prompts.names


@pytest.mark.parametrize(
    ("data", "name", "text"),
    [
        ("mnist5k", "seven", "seven"), ("digits", "3", "3"), ("eurosat", "AnnualCrop", "annual crop land"),
        ("eurosat", "Sea_Lake", "sea or lake"), ("fashion-mnist", "T-shirt/top", "T-shirt"), ("flowers", "wild_rose", "wild rose"),
    ],
)  # fmt: skip
def test_words_for_classes(data, name, text):
    assert make_prompts(data, [name], "").names == (text,)


def test_templates_of_ones_own():
    prompts = make_prompts("cifar10", ["airplane", "ship"], " a sketch of a {name} | {name} ")
    assert prompts.templates == ("a sketch of a {name}", "{name}")
    assert {prompts.text(0, seed) for seed in range(20)} == {"a sketch of an airplane", "airplane"}
    assert {prompts.text(1, seed) for seed in range(20)} == {"a sketch of a ship", "ship"}


def test_words_of_ones_own_for_single_classes():
    names = ("airplane", "deer", "wild_rose", "0")
    prompts = make_prompts("cifar10", names, class_words=" airplane: small plane, model | 0: river: upper course ")
    assert prompts.names == ("small plane, model", "deer, animal", "wild rose", "river: upper course")


def test_prompts_that_cannot_be(folder):
    wrong = "8 | 3: {name} | ten: letters | 4:"
    refused(
        *configure(folder, generator__class_words=wrong), "generator.class-words: got '8'; wanted 'class: word'", "got '3: {name}'",
        "no class 'ten'; the classes are zero, one,", "got '4:'",
    )  # fmt: skip
    for wrong in ("a photo", "a {class}", "{name} {", "{name} | a photo"):
        refused(*configure(folder, generator__prompt=wrong), "generator.prompt: got", "needs {name}")
    config, parts = configure(folder)
    nameless = dataclasses.replace(
        parts, info=dataclasses.replace(parts.info, name="other", class_names=("0", "", "cat", "3", "class 4"))
    )
    refused(config, nameless, "other has none for the labels 0, 1, 3, 4")
    assert make_prompts("other", ["0", "1"], "the figure {name}").text(1, 0) == "the figure 1"
