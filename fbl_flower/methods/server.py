"""The server's part of the methods that have one: SCAFFOLD's variate and FedGen's generator, kept by method and name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fbl_flower.config import RunConfig
from fbl_flower.methods.feature_generator import label_prior, new_generator, train_generator
from fbl_flower.methods.fedgen import LABEL_COUNTS, LABEL_PRIOR
from fbl_flower.methods.scaffold import first_variate, next_variate, scaled_update
from fbl_flower.params import Arrays
from fbl_flower.seeding import torch_stream

ServerState = dict[str, Arrays]  # for each method that has one; it is a part of the checkpoint


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


def with_first_state(
    state: ServerState, methods: Iterable[str], parameters: Callable[[], Iterable[tuple[str, torch.Tensor]]]
) -> ServerState:
    """Return `state` with the first one of those `methods` that have none yet; `parameters` is asked for the model's if it is needed.

    FedGen's begins after its first round: before it the generator has nothing to learn from.
    """
    if "scaffold" in state or "scaffold" not in methods:
        return state
    return state | {"scaffold": first_variate(parameters())}


def lacks_arrays(update: Update, state: ServerState) -> bool:
    """Tell whether a client did not send, or in other shapes, what its method needs."""
    match update.method:
        case "scaffold":
            wanted = state["scaffold"]
            return update.extra.keys() != wanted.keys() or any(update.extra[n].shape != a.shape for n, a in wanted.items())
        case "fedgen":
            counts = update.extra.get(LABEL_COUNTS)
            return counts is None or counts.shape != update.arrays["head.bias"].shape or bool((counts < 0).any())
        case _:
            return False


def model_to_average(update: Update, received: Mapping[str, np.ndarray], config: RunConfig) -> Mapping[str, np.ndarray]:
    """Return the model that a client adds to the mean: its own, or for SCAFFOLD the one that is eta_g times as far away."""
    if update.method != "scaffold":
        return update.arrays
    return scaled_update(
        received, update.arrays, learning_rate=config.scaffold.server_learning_rate, parameters=update.extra.keys()
    )


def next_state(
    state: ServerState, updates: Iterable[Update], *, config: RunConfig, num_scaffold: int, server_round: int
) -> ServerState:
    """Return the state after a round.

    Args:
        state: Before it.
        updates: Of the clients that count, in ascending order of client.
        config: Its `seed` and the methods' sections.
        num_scaffold: N of SCAFFOLD: all clients of the federation that run it.
        server_round: Names the random stream of the generator's training.
    """
    updates, after = list(updates), dict(state)
    variates = [u.extra for u in updates if u.method == "scaffold"]
    if variates:
        after["scaffold"] = next_variate(state["scaffold"], variates, num_clients=num_scaffold)
    teachers = [u for u in updates if u.method == "fedgen" and u.extra[LABEL_COUNTS].sum() > 0]
    if teachers:
        after["fedgen"] = _next_generator(state.get("fedgen", {}), teachers, config=config, server_round=server_round)
    return after


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
