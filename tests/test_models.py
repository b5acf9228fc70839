"""Classifiers: stems, norms, shapes, and where their random weights come from."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from fbl_flower.config import ModelConfig
from fbl_flower.errors import ConfigError
from fbl_flower.models import Classifier, as_received, check_model, empty_classifier, fitted, new_classifier
from fbl_flower.models.cpu_layers import use_cpu_layers
from fbl_flower.params import to_arrays

FULL: dict[str, Any] = {"width": 64, "stem": "imagenet", "norm": "group"}  # ResNet-18 as torchvision has it


def meta(*, channels: int = 3, num_classes: int = 10, **config: str) -> Classifier:
    return empty_classifier(ModelConfig(**(FULL | config)), channels=channels, num_classes=num_classes)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
@pytest.mark.parametrize(
    ("stem", "channels", "first", "num"),
    [
        ("imagenet", 3, (64, 3, 7, 7), 11_181_642),  # 11,689,512 of the 1000-class net - 990 * 513
        ("imagenet", 1, (64, 1, 7, 7), 11_175_370),  # 2 * 64 * 49 fewer
        ("32x32", 3, (64, 3, 3, 3), 11_173_962),  # 3 * 64 * (49 - 9) fewer
        ("32x32", 1, (64, 1, 3, 3), 11_172_810),
    ],
)
def test_resnet18(norm: str, kind: type[nn.Module], stem: str, channels: int, first: tuple[int, ...], num: int) -> None:
    model = meta(name="resnet18", stem=stem, norm=norm, channels=channels)
    assert model.features.conv1.weight.shape == first
    assert num_parameters(model) == num
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    assert len(norms) == 20 and all(isinstance(m, kind) for m in norms)
    assert model.width == 512
    images = torch.zeros(2, channels, 32, 32, device="meta")
    assert model.features(images).shape == (2, 512)
    assert model(images).shape == (2, 10)


def test_a_network_that_learns_nothing_from_so_small_images_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"learns nothing from images of 8 pixels; use model.stem='32x32', or data.image-size of 16"
    ):
        check_model(ModelConfig(**FULL), image_size=8)
    for config, size in (
        (ModelConfig(**FULL), 16),
        (ModelConfig(stem="32x32", norm="group"), 8),
        (ModelConfig(**(FULL | {"norm": "batch"})), 8),
        (ModelConfig(name="tiny"), 8),
    ):
        check_model(config, image_size=size)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("tiny", 32)])
def test_a_projection_is_two_more_layers_before_the_last(name: str, width: int) -> None:
    plain, projected = (
        new_classifier(ModelConfig(name=name, projection_width=out, **FULL), channels=3, num_classes=7, seed=0)
        for out in (0, 20)
    )
    assert (
        num_parameters(projected) == num_parameters(plain) - 7 * (width + 1) + width * (width + 1) + 20 * (width + 1) + 7 * 21
    )
    assert projected.width == 20
    x = torch.randn(2, 3, 32, 32)
    _, first, _, second = projected.features
    expected = second(first(projected.features[0](x)).clamp(min=0))
    assert torch.equal(projected.features(x), expected) and torch.equal(projected(x), projected.head(expected))


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("32x32", 32)])
def test_the_stem_decides_the_resolution_of_a_small_image(stem: str, side: int) -> None:
    """7x7/2 and max-pool/2 leave 8 of 32 pixels; the 3x3/1 stem leaves all."""
    model = meta(name="resnet18", stem=stem)
    shapes = []
    model.features.layer1.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    model(torch.zeros(1, 3, 32, 32, device="meta"))
    assert shapes == [(1, 64, side, side)]


@pytest.mark.parametrize(("channels", "num_classes", "num"), [(1, 10, 160 + 4640 + 330), (3, 7, 448 + 4640 + 231)])
def test_tiny(channels: int, num_classes: int, num: int) -> None:
    """Convolutions of (channels * 9 + 1) * 16 and (16 * 9 + 1) * 32 numbers, head of (32 + 1) * classes."""
    model = meta(name="tiny", channels=channels, num_classes=num_classes)
    assert num_parameters(model) == num
    for side in (8, 28, 33):
        assert model(torch.zeros(5, channels, side, side, device="meta")).shape == (5, num_classes)


def test_logits_are_the_head_of_the_features() -> None:
    model = new_classifier(ModelConfig(name="tiny"), channels=1, num_classes=10, seed=0)
    images = torch.rand(4, 1, 8, 8)
    assert torch.allclose(model(images), model.features(images) @ model.head.weight.T + model.head.bias, atol=1e-6)


def test_batch_statistics_are_among_the_arrays_and_group_norm_has_none() -> None:
    batch = new_classifier(ModelConfig(**(FULL | {"norm": "batch"})), channels=1, num_classes=10, seed=0)
    arrays = to_arrays(batch.state_dict())
    for end, dtype, count in (
        ("running_mean", "float32", 20),
        ("running_var", "float32", 20),
        ("num_batches_tracked", "int64", 20),
    ):
        found = [array for name, array in arrays.items() if name.endswith(end)]
        assert len(found) == count and {str(array.dtype) for array in found} == {dtype}
    assert arrays["features.bn1.running_var"].tolist() == [1.0] * 64
    assert not [name for name in meta(name="resnet18", norm="group").state_dict() if "running" in name or "tracked" in name]


def test_weights_follow_from_the_seed_alone_and_the_global_generator_is_left_alone() -> None:
    def make(seed: int) -> dict[str, torch.Tensor]:
        return new_classifier(ModelConfig(name="tiny"), channels=1, num_classes=10, seed=seed).state_dict()

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = make(0), make(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    state = torch.get_rng_state()
    assert meta(name="tiny").head.weight.is_meta
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_classifier_takes_the_weights_of_another() -> None:
    full = new_classifier(ModelConfig(name="tiny"), channels=3, num_classes=10, seed=0)
    empty = meta(name="tiny")
    assert empty.state_dict().keys() == full.state_dict().keys()
    empty.load_state_dict(full.state_dict(), assign=True)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(empty(images), full(images))


def converted(layer: nn.Module) -> nn.Module:
    """Return a copy of `layer` as the network uses it on a CPU."""
    ours = copy.deepcopy(layer)
    use_cpu_layers(ours)
    assert type(ours) is not type(layer)
    return ours


def assert_same_function(layer: nn.Module, x: torch.Tensor) -> None:
    """Compare outputs and gradients of torch's layer and ours."""
    pair, inputs = [layer, converted(layer)], [x.clone().requires_grad_(True) for _ in range(2)]
    outputs = [module(value) for module, value in zip(pair, inputs, strict=True)]
    assert outputs[0].shape == outputs[1].shape
    torch.testing.assert_close(*outputs)
    for output in outputs:
        (output**2).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for mine, theirs in zip(*(module.parameters() for module in pair), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2), (3, 3), (3, 4), (4, 4), (5, 5)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (5, 1, 2), (5, 3, 2), (2, 2, 1)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_a_small_map_is_torchs_own_with_the_same_gradients(size, kernel, stride, padding, layout) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, kernel, stride=stride, padding=padding, bias=False).double().to(memory_format=layout)
    assert_same_function(layer, torch.randn(4, 6, *size, dtype=torch.float64).contiguous(memory_format=layout))


def test_a_small_map_is_computed_tap_by_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way is taken where it is meant to be, and only there."""
    ours = converted(nn.Conv2d(2, 3, 3, padding=1, bias=False))
    calls: list[torch.Size] = []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: calls.append(x.shape) or torch.zeros(1))
    for side in (1, 2, 3):
        ours(torch.zeros(1, 2, side, side))
        with torch.autocast("cpu", torch.bfloat16):
            ours(torch.zeros(1, 2, side, side))
    assert [shape[-1] for shape in calls] == [3, 3]


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (2, 1), (3, 2), (4, 2)])
def test_under_autocast_a_small_map_is_computed_in_bf16_with_the_gradients_of_floats(size: int, stride: int) -> None:
    """bf16 has 8 bits of mantissa: products of 64 channels differ by a percent or so. Weights' gradients are floats, as the weights are.

    torch's own gradient in bf16 of the weights of a convolution with stride 2, of a map of one pixel, is sometimes garbage.
    """
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 32, 3, stride=stride, padding=1, bias=False)
    ours, x = converted(layer), torch.randn(16, 64, size, size)
    mine, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(mine)
    assert output.dtype == torch.bfloat16
    wanted = layer(theirs)
    direction = torch.randn_like(wanted)
    output.backward(direction.bfloat16())
    wanted.backward(direction)
    for got, exact in [(output.detach(), wanted.detach()), (mine.grad, theirs.grad), (ours.weight.grad, layer.weight.grad)]:
        assert float((got.float() - exact).norm()) <= 0.01 * float(exact.norm())
    assert ours.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, bias=True),
        nn.Conv2d(4, 4, 3, bias=False, groups=2),
        nn.Conv2d(4, 4, 3, bias=False, dilation=2),
        nn.Conv2d(4, 4, 1, bias=False, padding=1),
        nn.Conv2d(4, 4, 5, bias=False, padding=4, stride=3),
    ],
)
def test_other_convolutions_stay_torchs_own(layer: nn.Module) -> None:
    use_cpu_layers(layer)
    assert type(layer) is nn.Conv2d
    layer(torch.zeros(1, 4, 1, 1) if layer.padding != (0, 0) else torch.zeros(1, 4, 5, 5))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_is_torchs_own_and_keeps_the_layout(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 8).contiguous(memory_format=layout)
    layer = nn.MaxPool2d(3, stride=2, padding=1)
    assert_same_function(layer, x)
    assert converted(layer)(x).is_contiguous(memory_format=layout)


def test_resnet18_is_torchvisions_own_function_at_sizes_with_maps_of_one_pixel() -> None:
    model = new_classifier(ModelConfig(**FULL), channels=3, num_classes=10, seed=3)
    reference = resnet18(norm_layer=partial(nn.GroupNorm, 32))
    reference.fc = nn.Identity()
    reference.load_state_dict(model.features.state_dict())
    for side in (8, 28, 32, 64):
        x = torch.randn(2, 3, side, side)
        assert torch.allclose(model.features(x), reference(x), atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_width_64_is_torchvisions_resnet18(norm: str) -> None:
    """The same names and shapes, the same function of the same weights, and initial weights of the same spread."""
    ours = new_classifier(ModelConfig(**(FULL | {"norm": norm})), channels=3, num_classes=10, seed=0).features
    theirs = resnet18(norm_layer=partial(torch.nn.GroupNorm, 32) if norm == "group" else None)
    theirs.fc = torch.nn.Identity()
    stds = {name: tensor.std().item() for name, tensor in theirs.state_dict().items() if tensor.ndim == 4}
    for name, std in stds.items():
        assert ours.state_dict()[name].std().item() == pytest.approx(std, rel=0.1)
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours.eval()(images), theirs.eval()(images), atol=1e-5)


@pytest.mark.parametrize(("width", "parameters"), [(16, 701_466), (24, 1_575_202), (32, 2_797_610)])
def test_narrow_networks(width: int, parameters: int) -> None:
    """As torch counts them; the last features are 8 w wide, and a group of GroupNorm has two channels in the first stage."""
    model = new_classifier(ModelConfig(width=width, stem="32x32", norm="batch"), channels=3, num_classes=10, seed=0)
    assert model.width == 8 * width
    assert sum(p.numel() for p in model.parameters()) == parameters
    group = new_classifier(ModelConfig(width=width, stem="32x32", norm="group"), channels=3, num_classes=10, seed=0)
    groups = {m.num_groups for m in group.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert groups == {width // 2}
    assert group(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_stem_and_width_follow_images_and_machine() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert fitted(ModelConfig(), image_size=28, device=cpu) == ModelConfig(stem="32x32", width=16)
    assert fitted(ModelConfig(), image_size=64, device=cuda) == ModelConfig(stem="32x32", width=64)
    assert fitted(ModelConfig(), image_size=65, device=cpu) == ModelConfig(stem="imagenet", width=16)
    chosen = ModelConfig(stem="imagenet", width=24)
    assert fitted(chosen, image_size=8, device=cuda) == chosen
    with pytest.raises(ValueError, match="decided"):
        new_classifier(ModelConfig(), channels=3, num_classes=10, seed=0)


@pytest.mark.parametrize("projection", [0, 20])
@pytest.mark.parametrize(("stem", "width"), [("32x32", 16), ("imagenet", 24)])
def test_a_client_reads_stem_and_width_from_the_model_that_it_receives(stem: str, width: int, projection: int) -> None:
    made = ModelConfig(stem=stem, width=width, projection_width=projection)
    arrays = to_arrays(new_classifier(made, channels=1, num_classes=4, seed=0).state_dict())
    shuffled = dict(sorted(arrays.items(), reverse=True))
    assert as_received(ModelConfig(projection_width=projection), shuffled) == made
