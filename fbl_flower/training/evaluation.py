"""The evaluation: losses, accuracy, features, all in fp32. Never an alignment vector, never an augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fbl_flower.data.batches import to_float
from fbl_flower.data.examples import Examples
from fbl_flower.device import full_precision, memory_format
from fbl_flower.models import Classifier

_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean cross-entropy and share of right answers, 0 .. 1, over all images."""

    loss: float
    accuracy: float


@torch.no_grad()
def predict(model: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features float [N, D] and logits float [N, C] of uint8 images [N, C, H, W], in evaluation mode."""
    device = images.device
    layout = memory_format(model, device)
    model.to(memory_format=layout).eval()
    features, logits = (
        [images.new_zeros(0, model.width, dtype=torch.float)],
        [images.new_zeros(0, model.head.out_features, dtype=torch.float)],
    )
    for batch in images.split(_BATCH) if len(images) else ():
        with full_precision():
            f = model.features(to_float(batch).contiguous(memory_format=layout))
            features.append(f)
            logits.append(model.head(f))
    return torch.cat(features), torch.cat(logits)


def per_image_losses(model: Classifier, examples: Examples) -> torch.Tensor:
    """Return float [N], the cross-entropy of each image, for sampling by loss."""
    _, logits = predict(model, examples.images)
    return F.cross_entropy(logits, examples.labels, reduction="none")


def evaluate(model: Classifier, examples: Examples) -> Evaluation:
    """Evaluate on all images at once: a mean over images, not over batches."""
    _, logits = predict(model, examples.images)
    return Evaluation(
        loss=F.cross_entropy(logits.double(), examples.labels).item(),
        accuracy=(logits.argmax(1) == examples.labels).double().mean().item(),
    )
