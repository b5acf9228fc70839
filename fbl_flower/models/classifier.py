"""Classifiers y = H(F(x)): ResNet-18 from torchvision, and a tiny one for tests."""

from __future__ import annotations

import threading
from functools import partial

import torch
from torch import nn

from fbl_flower.config import ModelConfig
from fbl_flower.errors import ConfigError
from fbl_flower.models.cpu_layers import use_cpu_layers
from fbl_flower.seeding import torch_stream

_SMALLEST = 16  # pixels of images that ResNet-18 with the ImageNet stem and GroupNorm was seen to learn from
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
    """Make a classifier with random weights that follow from `seed` alone."""
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
            features, width = _resnet18(config, channels), 512
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
    from torchvision.models import resnet18  # seconds, in every process of a client, also of those that make no network

    norm = nn.BatchNorm2d if config.norm == "batch" else partial(nn.GroupNorm, 32)
    net = resnet18(norm_layer=norm)
    if config.stem == "32x32":
        net.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does for its own
    net.fc = nn.Identity()
    use_cpu_layers(net)
    return net


def _tiny(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
