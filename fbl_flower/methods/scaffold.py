"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378), Algorithm 1 with Option II."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from fbl_flower.config import TrainConfig
from fbl_flower.data.examples import Examples
from fbl_flower.methods.base import Finished, State, Step
from fbl_flower.models import Classifier
from fbl_flower.params import Arrays


class Scaffold:
    """A client's round: y <- y - eta_l (g(y) + c - c_i), and then c_i+ = c_i - c + (x - y) / (K eta_l).

    Variates are of parameters, not of buffers. Option II takes the steps for plain gradient descent, so momentum and clipping are off;
    weight decay is a part of the objective and stays.

    Args:
        learning_rate: eta_l; 0: that of the training settings.
        server_variate: c, by parameter name.
        client_variate: c_i, by parameter name; None in the client's first round: zero.
    """

    def __init__(self, *, learning_rate: float, server_variate: Mapping[str, np.ndarray], client_variate: State | None) -> None:
        self._learning_rate, self._c_arrays, self._c_i_state = learning_rate, server_variate, client_variate
        self._num_steps = 0
        self._x: State = {}
        self._c: State = {}
        self._c_i: State = {}
        self._correction: State = {}

    def settings(self, config: TrainConfig) -> TrainConfig:
        self._learning_rate = self._learning_rate or config.learning_rate
        return replace(config, learning_rate=self._learning_rate, momentum=0.0, nesterov=False, clip_norm=0.0)

    def begin(self, model: Classifier, examples: Examples) -> None:
        self._x = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._c = {name: torch.tensor(self._c_arrays[name], device=x.device) for name, x in self._x.items()}
        self._c_i = {
            name: torch.zeros_like(x) if self._c_i_state is None else self._c_i_state[name].to(x.device)
            for name, x in self._x.items()
        }
        self._correction = {name: self._c[name] - self._c_i[name] for name in self._x}

    def adjust_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def penalty(self, step: Step) -> None:
        return None

    def edit_gradients(self, model: Classifier) -> None:
        self._num_steps += 1
        for name, p in model.named_parameters():
            assert p.grad is not None
            p.grad += self._correction[name]

    def finish(self, model: Classifier) -> Finished:
        """Remember c_i+ and send c_i+ - c_i; a client that made no step keeps its c_i."""
        c_i, scale = dict(self._c_i), self._num_steps * self._learning_rate
        if self._num_steps:
            for name, y in model.named_parameters():
                c_i[name] = self._c_i[name] - self._c[name] + (self._x[name] - y.detach()) / scale
        return Finished(
            state={name: variate.cpu().contiguous() for name, variate in c_i.items()},
            sent={name: (variate - self._c_i[name]).cpu().numpy() for name, variate in c_i.items()},
        )


def first_variate(parameters: Iterable[tuple[str, torch.Tensor]]) -> Arrays:
    """Return c of round 1: zero, by parameter name."""
    return {name: np.zeros(tuple(p.shape), dtype=np.float32) for name, p in parameters}


def next_variate(c: Mapping[str, np.ndarray], deltas: Sequence[Mapping[str, np.ndarray]], *, num_clients: int) -> Arrays:
    """Return c + (|S| / N) mean over S of (c_i+ - c_i), which keeps c the mean of all clients' variates.

    Args:
        c: The server's variate.
        deltas: c_i+ - c_i of the clients S that took part, in the order in which they are summed.
        num_clients: N, all clients of the method.
    """
    after: Arrays = {}
    for name, variate in c.items():
        total = np.zeros(variate.shape, dtype=np.float64)
        for delta in deltas:
            total += delta[name]
        after[name] = (variate + total / num_clients).astype(variate.dtype)
    return after


def scaled_update(
    x: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray], *, learning_rate: float, parameters: Iterable[str]
) -> Arrays:
    """Return x + eta_g (y - x) for the parameters, and y for the buffers; the mean of such models is x + eta_g mean(y - x)."""
    after = dict(y)
    if learning_rate != 1.0:
        for name in parameters:
            after[name] = (x[name] + learning_rate * (y[name].astype(np.float64) - x[name])).astype(y[name].dtype)
    return after
