"""A grid of generated images, a row for each class: how a training is coming along."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn
from torchvision.utils import save_image

from fbl_flower.generation.diffusion import sample
from fbl_flower.seeding import derive
from fbl_flower.whole_file import replacing

_COLUMNS = 10
_MOST_CLASSES = 20
_STEPS, _GUIDANCE = 8, 2.0
_log = logging.getLogger("fbl_flower.generation")


def write_preview(
    file: Path, network: nn.Module, *, image_size: int, channels: int, num_classes: int, seed: int, device: torch.device
) -> None:
    """Write a PNG with ten images of each of the first twenty classes, from the same noise each time; leave it if the disk is full."""
    labels = [label for label in range(min(num_classes, _MOST_CLASSES)) for _ in range(_COLUMNS)]
    seeds = [derive(seed, "preview", place) for place in range(len(labels))]
    images = sample(
        network, labels, seeds, image_size=image_size, channels=channels, num_classes=num_classes,
        steps=_STEPS, guidance=_GUIDANCE, device=device,
    )  # fmt: skip
    try:
        with replacing(file) as part:
            save_image(images / 255, part, format="png", nrow=_COLUMNS, padding=2, pad_value=1.0)
    except OSError as error:  # no reason to end a training
        _log.warning("generator: no preview (%s)", error)
