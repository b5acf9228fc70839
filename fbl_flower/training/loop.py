"""The training loop, for every method, client, and row without a federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fbl_flower.balancing.alignment import alignment_offset
from fbl_flower.config import TrainConfig
from fbl_flower.data.batches import augment, batch_indices, to_float
from fbl_flower.data.examples import Examples
from fbl_flower.device import autocast, keep_freed_memory, memory_format
from fbl_flower.methods.base import LocalMethod, Step
from fbl_flower.methods.fedavg import FEDAVG
from fbl_flower.models import Classifier
from fbl_flower.seeding import torch_generator


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random shifts of at most `shift` pixels, and mirroring if `flip`."""

    shift: int
    flip: bool


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training was like; the model itself is changed in place.

    Attributes:
        loss: Mean cross-entropy of H(F(I)) over all images and epochs, without a method's penalty and without alignment vectors, which
            know the label: so that methods can be compared.
        synthetic_accuracy: Share of synthetic training images classified rightly by H(F(I)); NaN without any.
        aligned_accuracy: The same by H(F(I) + P_i).
    """

    loss: float
    synthetic_accuracy: float
    aligned_accuracy: float


def train(
    model: Classifier,
    examples: Examples,
    *,
    config: TrainConfig,
    augmentation: Augmentation | None,
    rng: torch.Generator,
    embeddings: nn.Parameter | None = None,
    embedding_learning_rate: float = 0.0,
    drop: float = 0.0,
    synthetic_weight: float = 1.0,
    method: LocalMethod = FEDAVG,
    epoch_factors: Sequence[float] | None = None,
) -> TrainResult:
    """Train by SGD on the cross-entropy and what `method` adds to it, in place.

    Every image is used once an epoch; a last, smaller batch is used too. With `embeddings`, synthetic images are aligned
    (Eq. 4) and the vectors are trained jointly, by the same loss at their own learning rate.

    Args:
        model: On the device where the training is to run.
        examples: On the same device, at least one image.
        config: Epochs, batch size, step size and so on.
        augmentation: None trains on the images as they are.
        rng: CPU generator of order, augmentation and drop.
        embeddings: float [C, D] on the device, the vectors P; None: no alignment.
        embedding_learning_rate: Step size of the vectors.
        drop: Probability that a synthetic image loses its vector.
        synthetic_weight: Of a synthetic image in the objective; a real one has 1. The reported loss is not weighted.
        method: The local objective; it begins here and is left to the caller to finish.
        epoch_factors: For each epoch, what the learning rates are multiplied by; None: 1.
    """
    keep_freed_memory()
    config = method.settings(config)
    device = examples.images.device
    layout = memory_format(model, device)
    model.to(memory_format=layout)
    method.begin(model, examples)
    weights = list(model.parameters())
    groups: list[dict[str, object]] = [{"params": weights, "weight_decay": config.weight_decay}]
    if embeddings is not None:
        groups.append({"params": [embeddings], "lr": embedding_learning_rate, "weight_decay": 0.0})
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=nesterov, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    # Drop has a stream of its own: switching alignment on changes neither the order nor the augmentation of the images.
    drop_rng = torch_generator(int(torch.randint(2**62, (), generator=rng)))
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right without P, right with P
    for epoch in range(config.epochs):
        if epoch_factors is not None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * epoch_factors[epoch]
        for index in batch_indices(len(examples), config.batch_size, rng):
            batch = examples.take(index.to(device))
            images = batch.images
            if augmentation is not None and config.augment:
                images = augment(images, shift=augmentation.shift, flip=augmentation.flip, rng=rng)
            model.train(len(batch) > 1)  # one image has no batch statistics: BatchNorm then uses its running ones
            inputs = to_float(images).contiguous(memory_format=layout)
            with autocast(config.precision, device):
                features = model.features(inputs)
                offset = None
                if embeddings is not None:
                    offset = alignment_offset(embeddings, batch.labels, batch.synthetic, drop=drop, rng=drop_rng)
                logits = model.head(features if offset is None else features + offset)
                penalty = method.penalty(Step(model=model, inputs=inputs, features=features, labels=batch.labels))
            logits = logits.float()
            adjusted = method.adjust_logits(logits)
            objective = loss = F.cross_entropy(logits, batch.labels)
            if adjusted is not logits or synthetic_weight != 1:
                objective = _weighted_loss(adjusted, batch, synthetic_weight)
            optimizer.zero_grad()
            (objective if penalty is None else objective + penalty).backward()
            method.edit_gradients(model)
            if config.clip_norm > 0:
                nn.utils.clip_grad_norm_(weights, config.clip_norm)
            if embeddings is not None:
                totals += _without_and_with(model.head, features.detach(), embeddings, batch)
            else:
                totals[0] += loss.detach() * len(batch)
            optimizer.step()
    num_seen, num_synthetic = config.epochs * len(examples), config.epochs * int(examples.synthetic.sum())
    loss_sum, right, right_aligned = totals.tolist()
    measured = embeddings is not None and num_synthetic > 0
    return TrainResult(
        loss=loss_sum / num_seen,
        synthetic_accuracy=right / num_synthetic if measured else float("nan"),
        aligned_accuracy=right_aligned / num_synthetic if measured else float("nan"),
    )


def _weighted_loss(logits: torch.Tensor, batch: Examples, synthetic_weight: float) -> torch.Tensor:
    """Return the mean over the batch of w_i l_i; it is not divided by the sum of the weights."""
    if synthetic_weight == 1:
        return F.cross_entropy(logits, batch.labels)
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    return torch.where(batch.synthetic, synthetic_weight * losses, losses).mean()


@torch.no_grad()
def _without_and_with(head: nn.Linear, features: torch.Tensor, embeddings: torch.Tensor, batch: Examples) -> torch.Tensor:
    """Return the loss without P, summed over the batch, and how many synthetic images are right without and with P."""
    features = features.float()
    plain = head(features)
    right = plain.argmax(1) == batch.labels
    aligned = head(features + embeddings[batch.labels]).argmax(1) == batch.labels
    loss = F.cross_entropy(plain, batch.labels, reduction="sum")
    return torch.stack([loss.double(), (right & batch.synthetic).sum(), (aligned & batch.synthetic).sum()])
