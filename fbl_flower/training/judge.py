"""The judge: the one network, trained by one recipe, that measures every generator.

A generator's worth is the accuracy on real images of a classifier that saw only the generator's images. A poor classifier hides the
difference between good and bad images. So the recipe is fixed, and no setting of a run changes it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import torch

from fbl_flower.config import ModelConfig, RunConfig, TrainConfig
from fbl_flower.data.datasets import DataParts
from fbl_flower.data.examples import Examples
from fbl_flower.errors import RunFailed
from fbl_flower.generation.measures import Classifier
from fbl_flower.training.central import train_centrally
from fbl_flower.training.evaluation import predict

JUDGE_MODEL = ModelConfig(name="resnet18", stem="32x32", norm="batch", width=16, projection_width=0)
JUDGE_TRAINING = TrainConfig(
    batch_size=64,
    learning_rate=0.2,
    schedule="one-cycle",
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    clip_norm=0.0,
    augment=True,
    precision="auto",
)
MIN_EPOCHS, MIN_STEPS = 20, 400


def judge_epochs(num_images: int) -> int:
    """Return max(20, ceil(400 / steps per epoch)): a small set gets at least 400 steps."""
    return max(MIN_EPOCHS, math.ceil(MIN_STEPS / math.ceil(num_images / JUDGE_TRAINING.batch_size)))


def train_judge(config: RunConfig, parts: DataParts, examples: Examples, seed: int) -> Classifier:
    """Train the judge's network on `examples`, with the data set's augmentation.

    Args:
        config: Its `device`; the rest is not looked at.
        parts: The data set that the examples are of.
        examples: At least one image.
        seed: Of the weights, the order and the augmentation.

    Raises:
        RunFailed: The training diverged.
    """
    judged = replace(config, model=JUDGE_MODEL, train=JUDGE_TRAINING)
    try:
        model = train_centrally(judged, parts, examples, epochs=judge_epochs(len(examples)), seed=seed).eval()
    except RunFailed as error:
        raise _diverged(examples) from error
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise _diverged(examples)
    device = next(model.parameters()).device

    def features(images: torch.Tensor) -> torch.Tensor:
        return predict(model, images.to(device))[0].cpu()

    def logits(images: torch.Tensor) -> torch.Tensor:
        return predict(model, images.to(device))[1].cpu()

    return Classifier(predict=logits, features=features)


def describe_judge() -> dict[str, Any]:
    """Return the recipe as JSON."""
    training = {name: value for name, value in asdict(JUDGE_TRAINING).items() if name != "epochs"}
    return {"model": asdict(JUDGE_MODEL), "train": training, "min_epochs": MIN_EPOCHS, "min_steps": MIN_STEPS}


def _diverged(examples: Examples) -> RunFailed:
    kind = "synthetic" if bool(examples.synthetic.any()) else "real"
    return RunFailed(f"the judge's training on {len(examples)} {kind} images diverged: its loss or weights are not finite")
