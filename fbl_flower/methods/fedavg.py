"""FedAvg (McMahan et al., arXiv 1602.05629): the cross-entropy and nothing else."""

from __future__ import annotations

import torch

from fbl_flower.config import TrainConfig
from fbl_flower.data.examples import Examples
from fbl_flower.methods.base import Finished, Step
from fbl_flower.models import Classifier


class FedAvg:
    """Adds nothing to the loop."""

    def settings(self, config: TrainConfig) -> TrainConfig:
        return config

    def begin(self, model: Classifier, examples: Examples) -> None:
        pass

    def adjust_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def penalty(self, step: Step) -> torch.Tensor | None:
        return None

    def edit_gradients(self, model: Classifier) -> None:
        pass

    def finish(self, model: Classifier) -> Finished:
        return Finished()


FEDAVG = FedAvg()  # it has no state: one serves all
