"""The server trains the global model on synthetic images: what a server with the same generator can do without its clients' help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import nn

from fbl_flower.config import RunConfig
from fbl_flower.data.datasets import DataParts
from fbl_flower.device import pick_device
from fbl_flower.params import Arrays, to_arrays
from fbl_flower.seeding import torch_stream
from fbl_flower.training.central import synthetic_examples, train_further
from fbl_flower.training.round import load_classifier


class Frozen(nn.Module):
    """Features that stay as they are: no gradients, and BatchNorm uses its running statistics, also in training."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.inner = features.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.inner(x)


def tune(arrays: Mapping[str, np.ndarray], config: RunConfig, parts: DataParts, *, server_round: int) -> Arrays:
    """Return the model after the server's training, of its last layer or of all of it.

    The last layer is trained on F(synthetic image), as CCVR (Luo et al., arXiv 2106.05001) trains it on features drawn from Gaussians.
    The images are the same in every tuning and class-balanced. Momentum, batch size, augmentation and schedule are the clients'.

    Args:
        arrays: The global model after a round.
        config: Its `server-tuning`, `train`, `generator` and `device`.
        parts: The federation's data set.
        server_round: Names the random stream of order and augmentation.
    """
    tuning, info = config.server_tuning, parts.info
    model = load_classifier(arrays, config, channels=info.channels, num_classes=info.num_classes, device=pick_device(config))
    if tuning.part == "head":
        model.features = Frozen(model.features)
    train_further(
        model,
        replace(config, train=replace(config.train, learning_rate=tuning.learning_rate or config.train.learning_rate)),
        parts,
        synthetic_examples(config, parts, num_images=tuning.num_images, purpose="server-tuning"),
        epochs=tuning.epochs,
        rng=torch_stream(config.seed, "server-tuning", server_round),
        what="server-tuning",
    )
    if isinstance(model.features, Frozen):
        model.features = model.features.inner
    return to_arrays(model.state_dict())
