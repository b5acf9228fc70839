"""FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127)."""

from __future__ import annotations

import torch

from fbl_flower.config import TrainConfig
from fbl_flower.data.examples import Examples
from fbl_flower.methods.base import Finished, Step
from fbl_flower.models import Classifier


class FedProx:
    """Eq. 2: h_k(w; w^t) = F_k(w) + (mu / 2) ||w - w^t||^2, the norm over parameters, not over buffers.

    Args:
        mu: >= 0; with 0 the gradients are FedAvg's.
    """

    def __init__(self, *, mu: float) -> None:
        self._mu = mu
        self._received: dict[str, torch.Tensor] = {}

    def settings(self, config: TrainConfig) -> TrainConfig:
        return config

    def begin(self, model: Classifier, examples: Examples) -> None:
        self._received = {name: p.detach().clone() for name, p in model.named_parameters()}

    def adjust_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def penalty(self, step: Step) -> torch.Tensor:
        squares = [(p - self._received[name]).square().sum() for name, p in step.model.named_parameters()]
        return self._mu / 2 * torch.stack(squares).sum()

    def edit_gradients(self, model: Classifier) -> None:
        pass

    def finish(self, model: Classifier) -> Finished:
        return Finished()
