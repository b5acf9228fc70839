"""Rectified flow: what a generator's network sees in one step, and how wrong it is.

The network learns the velocity that carries noise to images along straight lines (Liu et al., arXiv 2209.03003):
x_t = (1 - t) x + t e, with target e - x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fbl_flower.data.datasets import DataParts
from fbl_flower.data.examples import Examples
from fbl_flower.data.info import DataInfo
from fbl_flower.generation.augment import deform
from fbl_flower.generation.network import patch_of
from fbl_flower.generation.recipe import Augmentation, TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """What a network sees in one step, and should answer.

    Attributes:
        x_t: float [N, C, H, W], images on their way to noise, with pixels folded into channels.
        t: float [N], how far they are, in 0 .. 1.
        labels: int64 [N]; the number of classes stands for no label.
        velocity: float [N, C, H, W], noise minus image.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor
    velocity: torch.Tensor

    def to(self, device: torch.device) -> FlowBatch:
        return FlowBatch(
            x_t=self.x_t.to(device), t=self.t.to(device), labels=self.labels.to(device), velocity=self.velocity.to(device)
        )


def draw_batch(parts: DataParts, *, recipe: TrainingRecipe, stream: torch.Generator) -> FlowBatch:
    """Draw public images, and what `noised` draws for them."""
    index = torch.randint(len(parts.public), (recipe.batch_size,), generator=stream)
    return noised(
        parts.public.take(index),
        parts.info,
        augmentation=recipe.augmentation,
        label_dropout=recipe.label_dropout,
        stream=stream,
    )


def noised(
    batch: Examples, info: DataInfo, *, augmentation: Augmentation, label_dropout: float, stream: torch.Generator
) -> FlowBatch:
    """Draw deformations of a batch of images, noise, times and which labels to drop."""
    size = len(batch)
    pixels = deform(batch.images.float() / 127.5 - 1, augmentation, flip=info.flip, stream=stream)
    x = F.pixel_unshuffle(pixels, patch_of(batch.images.shape[-1]))
    e = torch.randn(x.shape, generator=stream)
    t = torch.sigmoid(torch.randn(size, generator=stream))  # most draws in the middle, where the task is hardest
    nothing = torch.full((size,), info.num_classes)
    labels = torch.where(torch.rand(size, generator=stream) < label_dropout, nothing, batch.labels)
    return FlowBatch(x_t=torch.lerp(x, e, t[:, None, None, None]), t=t, labels=labels, velocity=e - x)


def flow_loss(network: Callable[..., Any], batch: FlowBatch) -> torch.Tensor:
    """Return the mean squared error of the velocity (a scalar)."""
    velocity = network(batch.x_t, batch.t * 1000, class_labels=batch.labels).sample
    return F.mse_loss(velocity.float(), batch.velocity)
