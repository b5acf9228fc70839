"""Logit adjustment and FedLC: an offset for each class, from the client's own label counts, on the logits that its loss sees."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fbl_flower.config import TrainConfig
from fbl_flower.data.examples import Examples
from fbl_flower.methods.base import Finished, Step
from fbl_flower.models import Classifier

Offsets = Callable[[torch.Tensor], torch.Tensor]  # counts, float64 [C] -> offsets, float64 [C]


class LogitOffsets:
    """The cross-entropy of logits + offset[c]. Frequent classes get a head start in training, which the plain model then lacks.

    Offsets are shifted so that the largest is 0. The softmax does not see that, and equal counts are FedAvg bit for bit.

    Args:
        offsets: Maps counts to offsets; -inf masks a class out of the loss. See `logit_adjustment` and `fedlc`.
    """

    def __init__(self, offsets: Offsets) -> None:
        self._of_counts = offsets
        self._offset = torch.zeros(0)

    def settings(self, config: TrainConfig) -> TrainConfig:
        return config

    def begin(self, model: Classifier, examples: Examples) -> None:
        """Count the set that is trained on, so that a label that occurs is never masked."""
        counts = examples.counts(model.head.out_features).double()
        offset = self._of_counts(counts)
        if len(examples):
            offset = offset - offset.max()
        self._offset = offset.float()

    def adjust_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + self._offset

    def penalty(self, step: Step) -> torch.Tensor | None:
        return None

    def edit_gradients(self, model: Classifier) -> None:
        pass

    def finish(self, model: Classifier) -> Finished:
        return Finished()


def logit_adjustment(*, tau: float) -> Offsets:
    """Return tau log n_c (Menon et al., arXiv 2007.07314, Eq. 10; tau = 1 is the balanced softmax of Ren et al., arXiv 2007.10740).

    It multiplies the softmax weight of class c by n_c^tau. So tau = 0 is FedAvg, and for tau > 0 a missing class has weight 0.
    """
    return lambda counts: tau * counts.log() if tau else torch.zeros_like(counts)


def fedlc(*, tau: float) -> Offsets:
    """Return -tau n_c^(-1/4) (Zhang et al., arXiv 2209.00189), -inf for a missing class; tau = 0 is FedAvg."""
    return lambda counts: -tau * counts.pow(-0.25) if tau else torch.zeros_like(counts)
