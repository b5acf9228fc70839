"""Training: it learns, it repeats, it sees public images only, and it leaves a whole folder or none."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_generation_support import TINY, digits, two_class_parts

from fbl_flower.claim import Claim
from fbl_flower.errors import GeneratorError
from fbl_flower.generation import folder, preview, training, training_checkpoint
from fbl_flower.generation.augment import deform
from fbl_flower.generation.diffusion import DiffusionGenerator
from fbl_flower.generation.flow import draw_batch, flow_loss
from fbl_flower.generation.folder import quantize_generator
from fbl_flower.generation.quantization import WEIGHTS
from fbl_flower.generation.recipe import Augmentation, TrainingRecipe, check_files, read_info
from fbl_flower.generation.training import Training, train_generator
from fbl_flower.generation.training_checkpoint import Spent, TrainingCheckpoint
from fbl_flower.seeding import torch_stream

STILL = Augmentation(rotation=0, scale=0, shear=0, shift=0, elastic=0)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit_network(parts, *, recipe):
    fitted = Training(parts, recipe)
    while fitted.steps_done < recipe.steps:
        fitted.step()
    return fitted.average


def test_it_learns_black_and_white_from_public_images_only():
    # everything but the public part of these data raises when it is looked at
    parts = two_class_parts()
    recipe = TrainingRecipe(widths=(32,), steps=50, batch_size=32, warmup=5, learning_rate=3e-3, augmentation=STILL)
    first = fit_network(parts, recipe=dataclasses.replace(recipe, steps=1))
    last = fit_network(parts, recipe=recipe)
    with torch.no_grad():
        before, after = (
            sum(flow_loss(n, draw_batch(parts, recipe=recipe, stream=stream(k))).item() for k in range(8)) / 8
            for n in (first, last)
        )
    # zero velocity costs E(e - x)^2 = 1 + 1 = 2, as every pixel is -1 or 1 and noise has variance 1
    assert before == pytest.approx(2.0, abs=0.15)
    assert after < 1.2
    x_t, t = torch.zeros(2, 4, 2, 2), torch.full((2,), 900.0)
    with torch.no_grad():  # from mid-grey, the velocity away from the image is up for black and down for white
        v = last(x_t, t, class_labels=torch.tensor([0, 1])).sample.mean((1, 2, 3))
    assert v[0] > 0.5 and v[1] < -0.5


def test_progress_compares_training_images_with_others() -> None:
    """A first guess of no velocity costs E(e - x)^2: 2 for the black images, whose x is -1, and 1 for grey ones, whose x is 0."""
    parts = two_class_parts()
    black = parts.public.take(torch.arange(6))
    fresh = Training(dataclasses.replace(parts, validation=black), TINY)
    assert fresh.average_loss(black) == fresh.average_loss(black) == pytest.approx(2.0, abs=0.2)
    grey = dataclasses.replace(black, images=torch.full_like(black.images, 128))
    assert fresh.average_loss(grey) == pytest.approx(1.0, abs=0.1)
    fresh.step()
    assert fresh.describe().startswith("step 1 of 2: loss ")
    seen, unseen = fresh.average_loss(parts.public), fresh.average_loss(black)
    assert f", of the average {seen:.4f} on training and {unseen:.4f} on validation images, " in fresh.describe()
    alone = Training(dataclasses.replace(parts, validation=black.take(torch.arange(0))), TINY)
    alone.step()
    assert "average" not in alone.describe()


def test_the_seed_decides_the_weights_and_nothing_global_does():
    parts = digits()
    state = torch.get_rng_state()
    one = fit_network(parts, recipe=TINY).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again = fit_network(parts, recipe=TINY).state_dict()
    other = fit_network(parts, recipe=dataclasses.replace(TINY, seed=1)).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


def test_the_folder_says_how_it_came_to_be(tmp_path):
    lines: list[str] = []
    info = train_generator(digits(), recipe=TINY, out=tmp_path / "new" / "g", progress=lines.append)
    assert read_info(tmp_path / "new" / "g") == info
    assert check_files(tmp_path / "new" / "g", info) == []
    assert (info.data_name, info.image_size, info.channels, info.num_images) == ("digits", 8, 1, 300)
    assert info.public_sha256 == digits().public_sha256
    assert info.training == TINY
    assert info.versions["optimum-quanto"] == "0.2.7"
    assert {path.name for path in (tmp_path / "new" / "g").iterdir()} == {*info.files, "recipe.json"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["g"]
    assert lines[-1].startswith("step 2 of 2: loss ") and lines[-1].endswith(", 0 s left")


def test_the_same_recipe_gives_the_same_files(tmp_path):
    one, two = (train_generator(digits(), recipe=TINY, out=tmp_path / name) for name in ("one", "two"))
    assert one.files == two.files


@pytest.mark.parametrize("weights", ["8bit", "none"])
def test_a_generator_can_be_stored_in_more_bits(tmp_path, weights):
    sizes = {}
    for name in ("4bit", weights):
        info = train_generator(digits(), recipe=TINY, out=tmp_path / name, weights=name)
        assert (info.weights, read_info(tmp_path / name)) == (name, info)
        sizes[name] = (tmp_path / name / WEIGHTS).stat().st_size
        images = images_of(tmp_path / name)
        assert images.shape == (4, 1, 8, 8) and images.unique().numel() > 20
    assert sizes[weights] > 1.3 * sizes["4bit"]


def images_of(folder: Path) -> torch.Tensor:
    return DiffusionGenerator.load(folder, steps=2, guidance=1.0, batch_size=4).generate([0, 1, 2, 3], [5, 6, 7, 8])


@pytest.mark.parametrize("weights", ["4bit", "8bit"])
def test_floats_quantised_later_are_the_files_that_training_writes(tmp_path, weights):
    train_generator(digits(), recipe=TINY, out=tmp_path / "floats", weights="none")
    at_once = train_generator(digits(), recipe=TINY, out=tmp_path / "at-once", weights=weights)
    later = quantize_generator(tmp_path / "floats", tmp_path / "later", weights=weights)
    assert later.files == at_once.files and later.weights == weights
    assert later.cpu_seconds == read_info(tmp_path / "floats").cpu_seconds  # still that of the training
    with pytest.raises(GeneratorError, match=f"later has weights of {weights} already; wanted floats"):
        quantize_generator(tmp_path / "later", tmp_path / "again", weights="4bit")
    with pytest.raises(GeneratorError, match="later is there already"):
        quantize_generator(tmp_path / "floats", tmp_path / "later", weights="4bit")
    weights_file = tmp_path / "floats" / WEIGHTS
    weights_file.write_bytes(weights_file.read_bytes()[:-9])
    with pytest.raises(GeneratorError, match=f"{WEIGHTS} is damaged"):
        quantize_generator(tmp_path / "floats", tmp_path / "again", weights="4bit")
    assert not (tmp_path / "again").exists()


def test_ranges_of_the_augmentation_are_scaled_together():
    assert Augmentation(rotation=10, scale=0.2, shear=0.4, shift=0.6, elastic=0.8).scaled(0.5) == Augmentation(
        rotation=5, scale=0.1, shear=0.2, shift=0.3, elastic=0.4
    )
    for wrong in (-1, float("nan")):
        with pytest.raises(GeneratorError, match="wanted >= 0"):
            Augmentation().scaled(wrong)


def test_a_failure_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(folder, "save_quantized", fail)
    with pytest.raises(GeneratorError, match=r"g cannot be written \(disk full\); free space"):
        train_generator(digits(), recipe=TINY, out=tmp_path / "g")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Training, "step", lambda self: pytest.fail("worked"))
    with pytest.raises(GeneratorError, match="file/g cannot be written"):
        train_generator(digits(), recipe=TINY, out=tmp_path / "file" / "g")


def test_a_training_that_diverges_writes_nothing(tmp_path):
    recipe = dataclasses.replace(TINY, steps=50, learning_rate=1e6, warmup=0)
    with pytest.raises(GeneratorError, match=r"the loss of step \d+ is not finite: .* lower --learning-rate \(it is 1e\+06\)"):
        train_generator(digits(), recipe=recipe, out=tmp_path / "g")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("_network", "weights: conv_in.weight is not finite"),
        ("average", "average of the weights: conv_in.weight is not finite"),
    ],
)
@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_weights_that_are_not_finite_are_never_written(tmp_path, monkeypatch, where, message, checkpoint_every):
    """Broken in the last step: before the folder is written, and before a checkpoint is."""
    step = Training.step

    def breaking(self):
        step(self)
        if self.steps_done == TINY.steps:
            getattr(self, where).get_parameter("conv_in.weight").data[0, 0, 0, 0] = math.inf

    monkeypatch.setattr(Training, "step", breaking)
    with pytest.raises(GeneratorError, match=message):
        train_generator(digits(), recipe=TINY, out=tmp_path / "g", checkpoint_every=checkpoint_every)
    assert not (tmp_path / "g").exists()
    left = TrainingCheckpoint(tmp_path / "g.training", recipe=TINY, public_sha256=digits().public_sha256).read()
    assert left is None if checkpoint_every == 100 else left.steps_done == 1


def test_a_gradient_that_is_not_finite_ends_the_training(tmp_path, monkeypatch):
    """The loss is finite, and its derivative is not: sqrt at zero."""
    loss = training.flow_loss
    monkeypatch.setattr(training, "flow_loss", lambda *a: loss(*a).detach() + (0 * loss(*a)).sqrt())
    with pytest.raises(GeneratorError, match="the gradient of step 1 is not finite"):
        train_generator(digits(), recipe=TINY, out=tmp_path / "g")
    assert list(tmp_path.iterdir()) == []


def test_an_averaged_network_without_a_finite_loss_is_not_written(tmp_path, monkeypatch):
    """Weights so large that the network overflows are finite themselves."""
    monkeypatch.setattr(Training, "average_loss", lambda self, images: math.inf)
    with pytest.raises(GeneratorError, match="the loss of the averaged weights is not finite"):
        train_generator(digits(), recipe=TINY, out=tmp_path / "g")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_train_one_generator(tmp_path):
    (tmp_path / "g.training").mkdir()
    claim = Claim(tmp_path / "g.training", patience=0.0)
    with pytest.raises(GeneratorError, match=r"another process works on .*g.training; .* or choose another folder for yours"):
        train_generator(digits(), recipe=TINY, out=tmp_path / "g")
    claim.release()
    train_generator(digits(), recipe=TINY, out=tmp_path / "g")
    assert [file.name for file in tmp_path.iterdir()] == ["g"]


def test_a_preview_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch, caplog):
    def fail(_, file, **__):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(preview, "save_image", fail)
    train_generator(digits(), recipe=TINY, out=tmp_path / "g", checkpoint_every=1, stop_after=0)
    assert [file.name for file in (tmp_path / "g.training").iterdir()] == ["checkpoint.safetensors"]
    assert "no preview (disk full)" in caplog.text


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    def fail(_, file, *__):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(training_checkpoint, "save_file", fail)
    with pytest.raises(GeneratorError, match=r"checkpoint\.safetensors cannot be written \(disk full\)"):
        train_generator(digits(), recipe=TINY, out=tmp_path / "g", stop_after=0)
    assert not (tmp_path / "g.training").exists()


PIECES = dataclasses.replace(TINY, steps=7)


def test_a_training_in_pieces_ends_with_the_weights_of_one_piece(tmp_path, monkeypatch):
    whole = train_generator(digits(), recipe=PIECES, out=tmp_path / "whole")
    lines: list[str] = []
    arguments = {"recipe": PIECES, "out": tmp_path / "pieces", "checkpoint_every": 2, "progress": lines.append}

    def stop(error, after):
        """Stop in the middle of a step: its draws are made, its weights are not."""
        calls = iter(range(100))

        def stopping(network, batch):
            if torch.is_grad_enabled() and next(calls) == after:  # a step, and no progress line
                raise error
            return flow_loss(network, batch)

        monkeypatch.setattr(training, "flow_loss", stopping)

    stop(SystemExit(), 3)  # after steps 1, 2 and 3; the last checkpoint is of step 2
    with pytest.raises(SystemExit):
        train_generator(digits(), **arguments)
    stop(KeyboardInterrupt(), 3)  # after steps 3, 4 and 5
    with pytest.raises(KeyboardInterrupt):
        train_generator(digits(), **arguments)
    monkeypatch.setattr(training, "flow_loss", flow_loss)
    assert train_generator(digits(), stop_after=0, **arguments) is None
    folder = tmp_path / "pieces.training"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.safetensors", "preview.png"]
    with Image.open(folder / "preview.png") as preview:
        assert preview.size == (10 * (8 + 2) + 2, 10 * (8 + 2) + 2)
    info = train_generator(digits(), **arguments)
    assert info.files == whole.files and not folder.exists()
    assert [line for line in lines if line.startswith(("going on", "stopped"))] == [
        "going on after step 2 of 7", "going on after step 4 of 7",
        "stopped after step 4 of 7; the same command goes on", "going on after step 4 of 7",
    ]  # fmt: skip


def test_the_recipe_names_every_machine_that_a_training_was_on(tmp_path):
    first = Spent(wall=1, cpu=2, devices=("cuda",), compiled=True, threads=(64,))
    second = Spent(wall=3, cpu=4, devices=("cpu",), threads=(1,))
    assert first + second == Spent(wall=4, cpu=6, devices=("cpu", "cuda"), compiled=True, threads=(1, 64))
    parts, one = digits(), Training(digits(), PIECES)
    one.step()
    one.spent += first  # as if a piece had run on a GPU
    checkpoint = TrainingCheckpoint(tmp_path / "g.training", recipe=PIECES, public_sha256=parts.public_sha256)
    one.save(checkpoint)
    lines: list[str] = []
    info = train_generator(parts, recipe=PIECES, out=tmp_path / "g", progress=lines.append)
    assert f"with {torch.get_num_threads()} threads, where there were {torch.get_num_threads()}, 64 before" in lines[1]
    assert (info.device, info.compiled) == ("cpu, cuda", True) and info.wall_seconds > 1


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_up_to_rounding():
    plain, compiled = Training(digits(), TINY), Training(digits(), TINY, compiled=True)
    for one in (plain, compiled):
        one.step()
        one.step()
    assert (plain.spent.compiled, compiled.spent.compiled) == (False, True)
    assert plain.describe().split(",")[0] == compiled.describe().split(",")[0]  # step and loss, to four places
    states = plain.average.state_dict(), compiled.average.state_dict()
    assert states[0].keys() == states[1].keys()  # as a checkpoint names them
    assert all(torch.allclose(tensor, states[1][name], atol=1e-4) for name, tensor in states[0].items())


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    out = tmp_path / "g"
    assert train_generator(digits(), recipe=PIECES, out=out, stop_after=0) is None
    with pytest.raises(
        GeneratorError, match=r"g\.training/checkpoint\.safetensors belongs to a training with another recipe; remove"
    ):
        train_generator(digits(), recipe=TINY, out=out)
    fewer = dataclasses.replace(digits(), public=digits().public.take(torch.arange(200)))
    with pytest.raises(GeneratorError, match="with other public images"):
        train_generator(fewer, recipe=PIECES, out=out)
    checkpoint = tmp_path / "g.training" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-40])
    with pytest.raises(GeneratorError, match=r"checkpoint\.safetensors is damaged .*; remove .*g\.training to start afresh"):
        train_generator(digits(), recipe=PIECES, out=out)


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "g").mkdir()
    with pytest.raises(GeneratorError, match=f"{tmp_path / 'g'} is there already; remove it"):
        train_generator(digits(), recipe=TINY, out=tmp_path / "g")


def test_a_class_without_images_is_named(tmp_path):
    parts = two_class_parts()
    black = dataclasses.replace(parts, public=parts.public.take(torch.arange(6)))
    with pytest.raises(GeneratorError, match="no public image of white; use more public images"):
        train_generator(black, recipe=TINY, out=tmp_path / "g")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"widths": (48,)}, "widths: got \\(48,\\); wanted multiples of 32"),
        ({"widths": ()}, "widths"),
        ({"steps": 0}, "steps"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate: got nan"),
        ({"learning_rate": math.inf}, "learning_rate: got inf"),
    ],
)
def test_wrong_recipes_are_refused(wrong, message):
    with pytest.raises(GeneratorError, match=message):
        TrainingRecipe(**wrong)


def test_too_many_halvings_are_refused():
    with pytest.raises(GeneratorError, match="3 widths halve 2 x 2 positions 2 times.*use fewer widths"):
        fit_network(two_class_parts(), recipe=dataclasses.replace(TINY, widths=(32, 32, 32)))


def test_odd_sizes_train_without_folding():
    network = fit_network(two_class_parts(size=5), recipe=TINY)
    assert network.config["in_channels"] == 1 and network.config["sample_size"] == 5


def test_every_kept_weight_is_an_average(monkeypatch):
    # decay (1 + 1) / (10 + 1) = 2/11 after the first step: average = 2/11 start + 9/11 after the step
    parts, recipe = digits(), dataclasses.replace(TINY, steps=1, warmup=0)
    with_average = fit_network(parts, recipe=recipe).state_dict()["conv_in.bias"]
    without = fit_network(parts, recipe=dataclasses.replace(recipe, ema=0.0)).state_dict()["conv_in.bias"]
    start = fit_network(parts, recipe=dataclasses.replace(recipe, ema=0.0, learning_rate=1e-30)).state_dict()["conv_in.bias"]
    torch.testing.assert_close(with_average, start * 2 / 11 + without * 9 / 11)


def test_no_deformation_is_the_identity():
    images = torch.rand(3, 2, 7, 7, generator=stream()) * 2 - 1
    torch.testing.assert_close(deform(images, STILL, flip=False, stream=stream()), images, atol=2e-5, rtol=0)


def test_each_deformation_by_hand():
    images = torch.zeros(400, 1, 21, 21)
    images[:, :, 10, 15] = 1.0  # one lit pixel, 5 to the right of the centre
    rows, columns = torch.meshgrid(torch.arange(21.0), torch.arange(21.0), indexing="ij")

    def centre(**ranges):
        out = deform(images, dataclasses.replace(STILL, **ranges), flip=False, stream=stream())[:, 0].clamp(min=0)
        mass = out.sum((1, 2))
        return (out * rows).sum((1, 2)) / mass - 10, (out * columns).sum((1, 2)) / mass - 10

    y, x = centre(rotation=90.0)
    assert torch.hypot(x, y).mean() == pytest.approx(5, abs=0.2)  # stays on its circle
    assert (torch.atan2(y, x).abs().max().item() * 180 / math.pi) == pytest.approx(90, abs=4)
    y, x = centre(shift=0.1)  # at most 0.1 * 21 pixels either way
    assert (x - 5).abs().max() == pytest.approx(2.1, abs=0.25) and y.abs().max() == pytest.approx(2.1, abs=0.25)
    y, x = centre(scale=0.2)  # 5 / (1 -+ 0.2), and half of that again on one axis
    assert y.abs().max() < 0.2 and 3.3 < x.min() < 4.2 and 5.6 < x.max() < 7.0
    y, x = centre(elastic=0.05)
    assert 0.3 < (x - 5).abs().max() < 2.5


def test_flipping_mirrors_about_half():
    images = torch.full((200, 1, 4, 4), -1.0)
    images[..., 0] = 1.0
    left = deform(images, STILL, flip=True, stream=stream())[:, 0, 0, 0] > 0
    assert 70 < left.sum() < 130


def test_the_recipe_file_is_plain_json(tmp_path):
    train_generator(digits(), recipe=TINY, out=tmp_path / "g")
    raw = json.loads((tmp_path / "g" / "recipe.json").read_text())
    assert raw["training"]["widths"] == [32] and raw["training"]["augmentation"]["rotation"] == 12.0
    assert torch_stream(raw["training"]["seed"], "x").initial_seed() == torch_stream(0, "x").initial_seed()
