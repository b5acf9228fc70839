"""Clients whose data is bad: noise on their images, and wrong labels.

Only private images are touched, after the cut: the server's test set and the public images stay as they are. Everything follows from the
run's seed and an image's place in the private part, so it does not depend on who owns the image.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fbl_flower.config import RunConfig
from fbl_flower.data.datasets import DataParts
from fbl_flower.data.examples import Examples
from fbl_flower.errors import ConfigError
from fbl_flower.seeding import numpy_stream, torch_stream


def wrong_label_mask(config: RunConfig, num_private: int) -> np.ndarray:
    """Return bool [num_private]: which private images have a wrong label. `data.wrong-labels` of them do, rounded."""
    mask = np.zeros(num_private, dtype=bool)
    number = round(config.data.wrong_labels * num_private)
    if number:
        mask[numpy_stream(config.seed, "wrong-labels", "which").permutation(num_private)[:number]] = True
    return mask


def believed_labels(config: RunConfig, parts: DataParts) -> torch.Tensor:
    """Return int64 [N]: the labels of the private part as its owners know them, each wrong one of another class, drawn uniformly.

    Raises:
        ConfigError: Labels should be wrong, and there is one class only.
    """
    labels, num_classes = parts.private.labels, parts.info.num_classes
    mask = wrong_label_mask(config, len(labels))
    if not mask.any():
        return labels
    if num_classes < 2:
        raise ConfigError(["data.wrong-labels: the data set has one class; there is no other"])
    steps = numpy_stream(config.seed, "wrong-labels", "to").integers(1, num_classes, size=len(labels))
    return torch.where(torch.from_numpy(mask), (labels + torch.from_numpy(steps)) % num_classes, labels)


def private_examples(config: RunConfig, parts: DataParts, index: torch.Tensor) -> Examples:
    """Return private images as their owners have them, with noise and wrong labels as `config` asks.

    Args:
        config: Its `data.noise`, `data.wrong-labels` and `seed`.
        parts: The data set, cut.
        index: int64 [M], places in `parts.private`.
    """
    taken = parts.private.take(index)
    if config.data.wrong_labels > 0:
        taken = replace(taken, labels=believed_labels(config, parts)[index])
    if config.data.noise > 0:
        noisy = [_noisy(image, int(i), config) for i, image in zip(index, taken.images, strict=True)]
        taken = replace(taken, images=torch.stack(noisy) if noisy else taken.images)
    return taken


def _noisy(image: torch.Tensor, i: int, config: RunConfig) -> torch.Tensor:
    """Add noise to uint8 [C, H, W]; `data.noise` is in units of the whole range of a pixel."""
    noise = torch.randn(image.shape, generator=torch_stream(config.seed, "noise", i))
    return (image + 255 * config.data.noise * noise).round_().clamp_(0, 255).to(torch.uint8)
