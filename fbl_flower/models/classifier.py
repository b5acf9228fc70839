"""Classifiers y = H(F(x)): ResNet-18 from torchvision, and a tiny one for tests."""

from __future__ import annotations

import threading
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fbl_flower.config import ModelConfig
from fbl_flower.seeding import derive

_INIT_LOCK = threading.Lock()  # torch's initialisers draw from the global generator: one model at a time


class Classifier(nn.Module):
    """Features F, then a linear head H.

    Args:
        features: Module from float [N, C, H, W] to float [N, width].
        width: Number of features (512 for ResNet-18).
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


def new_classifier(config: ModelConfig, *, channels: int, num_classes: int, seed: int) -> Classifier:
    """Make a classifier with random weights that follow from `seed` alone."""
    with _INIT_LOCK, torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "model"))
        return _build(config, channels, num_classes)


def empty_classifier(config: ModelConfig, *, channels: int, num_classes: int) -> Classifier:
    """Make a classifier without memory for weights (device "meta"), to be given some by `load_state_dict(assign=True)`."""
    with torch.device("meta"):
        return _build(config, channels, num_classes)


def _build(config: ModelConfig, channels: int, num_classes: int) -> Classifier:
    match config.name:
        case "resnet18":
            return Classifier(_resnet18(config, channels), 512, num_classes)
        case "tiny":
            return Classifier(_tiny(channels), 32, num_classes)
        case _:
            raise ValueError(f"model.name: got {config.name!r}; allowed: resnet18 | tiny")


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
    for module in net.layer4.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = _WindowConv2d
    return net


class _WindowConv2d(nn.Conv2d):
    """A convolution that is one product of matrices where its window holds the whole map.

    Small images end in maps of one pixel. A padded 3x3 window there multiplies eight of its nine weights by padding;
    leaving those out is the same function, and made training steps of ResNet-18 at 28 px 1.1 to 1.3 times as fast where measured.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (height, width), kernel, padding = x.shape[-2:], self.kernel_size[0], int(self.padding[0])
        largest = max(height, width)
        one_window = largest + 2 * padding - kernel < self.stride[0] and largest + padding <= kernel
        if not one_window:
            return super().forward(x)
        seen = self.weight[:, :, padding : padding + height, padding : padding + width]
        return F.linear(x.flatten(1), seen.flatten(1), self.bias)[:, :, None, None]


def _tiny(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
