"""Classifiers y = H(F(x)): ResNet-18 of any width, and a tiny one for tests."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from fbl_flower.config import ModelConfig
from fbl_flower.errors import ConfigError
from fbl_flower.models.cpu_layers import use_cpu_layers
from fbl_flower.seeding import torch_stream

_SMALLEST = 16  # pixels of images that ResNet-18 with the ImageNet stem and GroupNorm was seen to learn from
_LARGEST_SMALL = 64  # pixels up to which the 3x3 stem is the better one
_INIT_LOCK = threading.Lock()  # torch's initialisers draw from the global generator: one model at a time


class Classifier(nn.Module):
    """Features F, then a linear head H.

    Args:
        features: Module from float [N, C, H, W] to float [N, width].
        width: Number of features (512 for ResNet-18 without a projection).
        num_classes: Number of logits.
    """

    def __init__(self, features: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, num_classes)

    @property
    def width(self) -> int:
        return self.head.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [N, classes] of images [N, C, H, W] scaled to -1 .. 1."""
        return self.head(self.features(x))


def fitted(config: ModelConfig, *, image_size: int, device: torch.device) -> ModelConfig:
    """Return the settings with stem and width decided: by the size of the images, and by the machine that makes the first model."""
    stem = ("32x32" if image_size <= _LARGEST_SMALL else "imagenet") if config.stem == "auto" else config.stem
    return replace(config, stem=stem, width=config.width or (64 if device.type == "cuda" else 16))


def as_received(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> ModelConfig:
    """Return the settings with the stem and width that `arrays` have: who receives a model need not know what made it."""
    if config.name != "resnet18":
        return config
    first = arrays.get(min((name for name in arrays if name.endswith("conv1.weight")), key=len, default=""))
    if first is None or first.ndim != 4:
        raise ConfigError(
            ["model.name: 'resnet18'; the model that was received has no first convolution, and is another network"]
        )
    return replace(config, stem="32x32" if first.shape[-1] == 3 else "imagenet", width=len(first))


def check_model(config: ModelConfig, *, image_size: int) -> None:
    """Refuse a network that cannot learn from images so small; raises `ConfigError`.

    With the ImageNet stem, all but the first quarter of ResNet-18 sees maps of one pixel of an image of 8 pixels, and GroupNorm makes
    little more than signs of those: on the digits it stays at chance, where BatchNorm and the 3x3 stem do not.
    """
    if (config.name, config.stem, config.norm) == ("resnet18", "imagenet", "group") and image_size < _SMALLEST:
        raise ConfigError(
            [
                f"model.stem: 'imagenet' with model.norm 'group' learns nothing from images of {image_size} pixels; "
                f"use model.stem='32x32', or data.image-size of {_SMALLEST} and more"
            ]
        )


def new_classifier(config: ModelConfig, *, channels: int, num_classes: int, seed: int) -> Classifier:
    """Make a classifier with random weights that follow from `seed` alone; `config` is as `fitted` returns it."""
    with _INIT_LOCK, torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch_stream(seed, "model").get_state())
        return _build(config, channels, num_classes)


def empty_classifier(config: ModelConfig, *, channels: int, num_classes: int) -> Classifier:
    """Make a classifier without memory for weights (device "meta"), to be given some by `load_state_dict(assign=True)`."""
    with torch.device("meta"):
        return _build(config, channels, num_classes)


def _build(config: ModelConfig, channels: int, num_classes: int) -> Classifier:
    match config.name:
        case "resnet18":
            features, width = _resnet18(config, channels), 8 * config.width
        case "tiny":
            features, width = _tiny(channels), 32
        case _:
            raise ValueError(f"model.name: got {config.name!r}; allowed: resnet18 | tiny")
    if config.projection_width:
        features = _projected(features, width, config.projection_width)
    return Classifier(features, config.projection_width or width, num_classes)


def _projected(features: nn.Module, width: int, out: int) -> nn.Module:
    """MOON's projection head, a part of the network under every method (arXiv 2103.16257, Sec. 3.3 and 4.1)."""
    return nn.Sequential(features, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


def _resnet18(config: ModelConfig, channels: int) -> nn.Module:
    """Build F of ResNet-18 (He et al., arXiv 1512.03385, Table 1): a stem, four stages of two blocks, the mean over pixels.

    Stages have w, 2w, 4w and 8w channels; w = 64 is ResNet-18, with torchvision's names and initial values. GroupNorm has w/2 groups, the
    32 of ResNet-18 at any width, so that a group is two channels in the first stage and sixteen in the last.
    """
    from torchvision.models.resnet import (
        BasicBlock,
    )  # seconds, in every process of a client, also of those that make no network

    if config.stem == "auto" or not config.width:
        raise ValueError(f"model: expected settings with stem and width decided, got {config.stem!r} and {config.width}")
    w = config.width
    norm = nn.BatchNorm2d if config.norm == "batch" else partial(nn.GroupNorm, w // 2)
    small = config.stem == "32x32"
    net = nn.Sequential()
    net.conv1 = nn.Conv2d(channels, w, 3, padding=1, bias=False) if small else nn.Conv2d(channels, w, 7, 2, 3, bias=False)
    net.bn1 = norm(w)
    net.relu = nn.ReLU(inplace=True)
    net.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
    before = w
    for stage, stride in enumerate((1, 2, 2, 2)):
        out = w * 2**stage
        shortcut = nn.Sequential(nn.Conv2d(before, out, 1, stride, bias=False), norm(out)) if stride > 1 else None
        blocks = [BasicBlock(before, out, stride, shortcut, norm_layer=norm), BasicBlock(out, out, norm_layer=norm)]
        net.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        before = out
    net.avgpool, net.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    use_cpu_layers(net)
    return net


def _tiny(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
