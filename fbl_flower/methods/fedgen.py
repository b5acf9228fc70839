"""FedGen (Zhu et al., "Data-Free Knowledge Distillation for Heterogeneous Federated Learning", arXiv 2105.10056): the client's part."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from fbl_flower.config import TrainConfig
from fbl_flower.data.examples import Examples
from fbl_flower.methods.base import Finished, State, Step
from fbl_flower.methods.feature_generator import generate_features
from fbl_flower.models import Classifier
from fbl_flower.params import to_state

LABEL_COUNTS, LABEL_PRIOR = "label-counts", "label-prior"


class FedGen:
    """Eq. 6: the cross-entropy + weight E_{y ~ p(y), z ~ G(.|y)} [CE(H(z), y)], one generated feature for each image of the batch.

    The client's label counts are sent, as published: this method is outside the promise that class counts stay on the client. With
    balancing they are the counts of the balanced set.

    Reading: in the first round, in which the generator has learned nothing yet, none is sent and the loss is FedAvg's, as in the
    authors' code. That code has a second, distilling term with the real batch's labels, which the paper does not; it is left out.

    Args:
        weight: >= 0, 1 in the paper; with 0 the gradients are FedAvg's.
        received: The generator's weights and p(y); empty where the server has none yet.
        rng: CPU generator of labels and noise, of its own.
    """

    def __init__(self, *, weight: float, received: Mapping[str, np.ndarray], rng: torch.Generator) -> None:
        self._weight, self._received, self._rng = weight, received, rng
        self._generator: State = {}
        self._prior = torch.zeros(0)
        self._counts = torch.zeros(0, dtype=torch.int64)

    def settings(self, config: TrainConfig) -> TrainConfig:
        return config

    def begin(self, model: Classifier, examples: Examples) -> None:
        self._counts = examples.counts(model.head.out_features)
        if self._received:
            self._generator = to_state(self._received, model.head.weight.device)
            self._prior = self._generator.pop(LABEL_PRIOR).cpu()

    def adjust_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def penalty(self, step: Step) -> torch.Tensor | None:
        if not self._generator:
            return None
        device, number = step.labels.device, len(step.labels)
        noise_width = self._generator["hidden.weight"].shape[1] - len(self._prior)
        labels = torch.multinomial(self._prior, number, replacement=True, generator=self._rng).to(device)
        noise = torch.randn(number, noise_width, generator=self._rng).to(device)
        features = generate_features(self._generator, labels, noise, num_classes=len(self._prior))
        return self._weight * F.cross_entropy(step.model.head(features).float(), labels)

    def edit_gradients(self, model: Classifier) -> None:
        pass

    def finish(self, model: Classifier) -> Finished:
        return Finished(sent={LABEL_COUNTS: self._counts.cpu().numpy()})
