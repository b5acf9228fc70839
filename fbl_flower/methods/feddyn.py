"""FedDyn (Acar et al., "Federated Learning Based on Dynamic Regularization", arXiv 2111.04263), Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fbl_flower.config import TrainConfig
from fbl_flower.data.examples import Examples
from fbl_flower.methods.base import Finished, State, Step
from fbl_flower.models import Classifier
from fbl_flower.params import Arrays


class FedDyn:
    """A client's objective f_k(w) - <h_k, w> + (alpha / 2) ||w - w_t||^2; afterwards h_k <- h_k - alpha (w_k - w_t).

    Both terms are of parameters, not of buffers. Where a client's training has settled, h_k is its gradient.

    Args:
        alpha: >= 0; with 0 the gradients are FedAvg's.
        state: h_k, by parameter name; None in the client's first round: zero.
    """

    def __init__(self, *, alpha: float, state: State | None) -> None:
        self._alpha, self._h_state = alpha, state
        self._received: State = {}
        self._h: State = {}

    def settings(self, config: TrainConfig) -> TrainConfig:
        return config

    def begin(self, model: Classifier, examples: Examples) -> None:
        self._received = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._h = {
            name: torch.zeros_like(p) if self._h_state is None else self._h_state[name].to(p.device)
            for name, p in self._received.items()
        }

    def adjust_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def penalty(self, step: Step) -> None:
        return None

    def edit_gradients(self, model: Classifier) -> None:
        """Add -h_k + alpha (w - w_t), the gradient of both terms."""
        for name, p in model.named_parameters():
            assert p.grad is not None
            p.grad += self._alpha * (p.detach() - self._received[name]) - self._h[name]

    def finish(self, model: Classifier) -> Finished:
        """Remember h_k; nothing is sent beside the model."""
        after = {
            name: self._h[name] - self._alpha * (p.detach() - self._received[name]) for name, p in model.named_parameters()
        }
        return Finished(state={name: h.cpu().contiguous() for name, h in after.items()})


def server_correction(
    mean: Arrays,
    before: Mapping[str, np.ndarray],
    models: Sequence[Mapping[str, np.ndarray]],
    h: Mapping[str, np.ndarray],
    *,
    alpha: float,
    num_clients: int,
) -> tuple[Arrays, Arrays]:
    """Return the next global model, mean - h / alpha, and the server's next h <- h - (alpha / N) sum_k (w_k - w_t).

    Args:
        mean: Of all models of the round.
        before: w_t.
        models: w_k of the round's FedDyn clients, in the order in which they are summed.
        h: By parameter name.
        alpha: With 0 both stay as they are.
        num_clients: N, all clients of the federation.
    """
    if alpha == 0:
        return mean, dict(h)
    model, after = dict(mean), dict(h)
    for name, last in h.items():
        total = np.zeros(last.shape, dtype=np.float64)
        for w in models:
            total += w[name].astype(np.float64) - before[name]
        moved = last - alpha / num_clients * total
        after[name] = moved.astype(last.dtype)
        model[name] = (mean[name] - moved / alpha).astype(mean[name].dtype)
    return model, after
