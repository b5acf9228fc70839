"""The server's part of the methods that have one: SCAFFOLD's variate, FedGen's generator, FedDyn's h, kept by method and name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fbl_flower.config import RunConfig
from fbl_flower.methods.feature_generator import label_prior, new_generator, train_generator
from fbl_flower.methods.feddyn import server_correction
from fbl_flower.methods.fedgen import LABEL_COUNTS, LABEL_PRIOR
from fbl_flower.methods.scaffold import first_variate, next_variate, scaled_update
from fbl_flower.params import Arrays
from fbl_flower.seeding import torch_stream

ServerState = dict[str, Arrays]  # for each method that has one; it is a part of the checkpoint
FEDDYN_H = "feddyn-h"  # no method, so it is sent to nobody
_CLIENTS = "scaffold-clients"  # N of SCAFFOLD; no method, so it is sent to nobody


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a client sent.

    Attributes:
        method: The client's method.
        arrays: Its model.
        extra: The method's own arrays.
    """

    method: str
    arrays: Mapping[str, np.ndarray]
    extra: Mapping[str, np.ndarray]


def with_clients(
    state: ServerState, methods: Sequence[str], parameters: Callable[[], Iterable[tuple[str, torch.Tensor]]]
) -> ServerState:
    """Return the state before a round of these clients: with FedDyn's first h, SCAFFOLD's first variate, and c as the mean over all clients known by now.

    A client that is new has c_i = 0, so where N grows, c shrinks by N before / N now. N does not fall: a client that is away, or
    has another method since, keeps its c_i, and c its part. FedGen's state begins after its first round: before it the generator has
    nothing to learn from.

    Args:
        state: After the last round.
        methods: Of every client of the federation that is known.
        parameters: Asked for the model's, if they are needed.
    """
    if "feddyn" in methods and FEDDYN_H not in state:
        state = state | {FEDDYN_H: first_variate(parameters())}
    now = methods.count("scaffold")
    if "scaffold" not in state:
        return state | {"scaffold": first_variate(parameters()), _CLIENTS: _number(now)} if now else state
    before = _num_scaffold(state) or now
    if now <= before:
        return state | {_CLIENTS: _number(before)}
    shrunk = {name: (c * (before / now)).astype(c.dtype) for name, c in state["scaffold"].items()}
    return state | {"scaffold": shrunk, _CLIENTS: _number(now)}


def arrays_to_send(method: str, state: ServerState, model: Mapping[str, np.ndarray]) -> Arrays:
    """Return arrays of the names, shapes and dtypes that every client of a method sends beside its model; empty: none."""
    match method:
        case "scaffold":
            return state["scaffold"]
        case "fedgen":
            return {LABEL_COUNTS: np.zeros(model["head.bias"].shape, dtype=np.int64)}
        case _:
            return {}


def model_to_average(update: Update, received: Mapping[str, np.ndarray], config: RunConfig) -> Mapping[str, np.ndarray]:
    """Return the model that a client adds to the mean: its own, or for SCAFFOLD the one that is eta_g times as far away."""
    if update.method != "scaffold":
        return update.arrays
    return scaled_update(
        received, update.arrays, learning_rate=config.scaffold.server_learning_rate, parameters=update.extra.keys()
    )


def corrected(
    mean: Arrays, received: Mapping[str, np.ndarray], state: ServerState, updates: Iterable[Update], *, config: RunConfig
) -> tuple[Arrays, ServerState]:
    """Return the mean of a round with FedDyn's term taken off, and the state after it; without its clients, both as they are.

    Args:
        mean: Of all clients' models.
        received: The model that they started from.
        state: Before the round, as `with_clients` has it.
        updates: Of the clients that count, in ascending order of client.
        config: Its `num-clients` and `feddyn`.
    """
    if FEDDYN_H not in state:
        return mean, state
    models = [u.arrays for u in updates if u.method == "feddyn"]
    alpha = config.feddyn.alpha
    model, h = server_correction(mean, received, models, state[FEDDYN_H], alpha=alpha, num_clients=config.num_clients)
    return model, state | {FEDDYN_H: h}


def next_state(state: ServerState, updates: Iterable[Update], *, config: RunConfig, server_round: int) -> ServerState:
    """Return the state after a round.

    Args:
        state: Before it, as `with_clients` has it.
        updates: Of the clients that count, in ascending order of client.
        config: Its `seed` and the methods' sections.
        server_round: Names the random stream of the generator's training.
    """
    updates, after = list(updates), dict(state)
    variates = [u.extra for u in updates if u.method == "scaffold"]
    if variates:
        after["scaffold"] = next_variate(state["scaffold"], variates, num_clients=_num_scaffold(state))
    teachers = [u for u in updates if u.method == "fedgen" and u.extra[LABEL_COUNTS].sum() > 0]
    if teachers:
        after["fedgen"] = _next_generator(state.get("fedgen", {}), teachers, config=config, server_round=server_round)
    return after


def _number(value: int) -> Arrays:
    return {"N": np.array([value], dtype=np.float32)}


def _num_scaffold(state: ServerState) -> int:
    return int(state[_CLIENTS]["N"][0]) if _CLIENTS in state else 0


def _next_generator(before: Arrays, teachers: list[Update], *, config: RunConfig, server_round: int) -> Arrays:
    """Train the generator on the heads of a round's clients; p(y) is theirs too."""
    generator = {name: array for name, array in before.items() if name != LABEL_PRIOR}
    num_classes, width = teachers[0].arrays["head.weight"].shape
    if not generator:
        rng = torch_stream(config.seed, "fedgen", "weights")
        generator = new_generator(config.fedgen, num_classes=num_classes, width=width, rng=rng)
    counts = np.stack([u.extra[LABEL_COUNTS] for u in teachers])
    heads = [(u.arrays["head.weight"], u.arrays["head.bias"]) for u in teachers]
    rng = torch_stream(config.seed, "fedgen", "generator", server_round)
    return train_generator(generator, heads, counts, config=config.fedgen, rng=rng) | {LABEL_PRIOR: label_prior(counts)}
