"""MOON (Li et al., "Model-Contrastive Federated Learning", arXiv 2103.16257)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from fbl_flower.config import TrainConfig
from fbl_flower.data.examples import Examples
from fbl_flower.methods.base import Finished, State, Step
from fbl_flower.models import Classifier


class Moon:
    """Eq. 3 and 4: the cross-entropy + mu l_con, which draws features to those of the received model and away from the previous one.

    l_con = -log(exp(sim(z, z_glob) / tau) / (exp(sim(z, z_glob) / tau) + exp(sim(z, z_prev) / tau))), with cosine similarities,
    is the cross-entropy of the two stacked similarities with label 0. The two other models stay as they are, in evaluation mode.

    z is F(x), what the last layer sees. Departure: the paper's networks have a projection of two layers before it, under every method; here
    `model.projection-width` = 256 does that, and the default is none. Alignment vectors take no part: z is F(x) for synthetic images too.

    Args:
        mu: >= 0; with 0 the gradients are FedAvg's.
        temperature: tau, > 0.
        previous: The client's own model after its last round, by name, buffers included; None in its first round, in which
            the received model takes its place: both similarities are then equal, and l_con pulls nowhere.
    """

    def __init__(self, *, mu: float, temperature: float, previous: State | None) -> None:
        self._mu, self._temperature, self._state = mu, temperature, previous
        self._received: Classifier
        self._previous: Classifier

    def settings(self, config: TrainConfig) -> TrainConfig:
        return config

    def begin(self, model: Classifier, examples: Examples) -> None:
        self._received = copy.deepcopy(model).requires_grad_(False).eval()
        self._previous = copy.deepcopy(self._received)
        if self._state is not None:
            self._previous.load_state_dict(self._state)

    def adjust_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def penalty(self, step: Step) -> torch.Tensor:
        with torch.no_grad():
            others = [model.features(step.inputs).float() for model in (self._received, self._previous)]
        z = step.features.float()
        similarities = torch.stack([F.cosine_similarity(z, other, dim=1) for other in others], dim=1)
        with_received = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        return self._mu * F.cross_entropy(similarities / self._temperature, with_received)

    def edit_gradients(self, model: Classifier) -> None:
        pass

    def finish(self, model: Classifier) -> Finished:
        return Finished(state={name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()})
