"""What a local method is to the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from fbl_flower.config import TrainConfig
from fbl_flower.data.examples import Examples
from fbl_flower.models import Classifier
from fbl_flower.params import Arrays

State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a penalty may look at in one step.

    Attributes:
        model: In training, with the weights of this step.
        inputs: float [N, C, H, W], the batch, augmented and scaled to -1 .. 1.
        features: [N, D], F of the inputs, without alignment vectors, with its graph; in bf16 where the forward pass is.
        labels: int64 [N].
    """

    model: Classifier
    inputs: torch.Tensor
    features: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a round leaves behind beside the model.

    Attributes:
        state: What the client remembers until its next round, on its own disk; None: nothing.
        sent: Named arrays that go to the server with the model; the same names from every client of the method.
    """

    state: State | None = None
    sent: Arrays = field(default_factory=dict)


class LocalMethod(Protocol):
    """One client's objective in one round. An object serves one round."""

    def settings(self, config: TrainConfig) -> TrainConfig:
        """Return the training settings that the method allows."""

    def begin(self, model: Classifier, examples: Examples) -> None:
        """Look at the received model, on its device, and at what will be trained on, which may be nothing."""

    def adjust_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits that the cross-entropy sees, float32 [N, C]; alignment is in them already."""

    def penalty(self, step: Step) -> torch.Tensor | None:
        """Return a scalar to add to the cross-entropy of the step, or None."""

    def edit_gradients(self, model: Classifier) -> None:
        """Change the gradients of the step in place, before they are clipped; called once a step."""

    def finish(self, model: Classifier) -> Finished:
        """Return what is left after the last step."""
