"""Whether a new global model can be gone on from, and which clients spoiled one that cannot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

import numpy as np

from fbl_flower.federation.wire import Reply
from fbl_flower.params import Arrays, all_finite
from fbl_flower.reporting.rundir import Checkpoint

_DIVERGED = 1e9  # a loss that no classifier has that learns
_FAR = 100.0  # times as far from the old model as the median client


def is_finite(point: Checkpoint) -> bool:
    """Tell whether the global model and all that the server keeps beside it are finite."""
    kept = [point.arrays, *point.method_state.values(), {} if point.embeddings is None else {"P": point.embeddings}]
    return all(map(all_finite, kept))


def loss_problem(loss: float) -> str:
    """Say what is wrong with a model's loss; empty: nothing."""
    if loss < _DIVERGED:
        return ""
    return f"the loss is {f'{loss:.3g}' if math.isfinite(loss) else 'not finite'}"


def spoilers(
    replies: Mapping[int, Reply], before: Mapping[str, np.ndarray], is_usable: Callable[[Arrays], bool]
) -> dict[int, str]:
    """Return which clients to leave out of a round whose new model cannot be used, and why.

    That is every client whose own model cannot be used, and every one that moved a hundred times as far as the median client. If training
    diverged at all clients, the settings are to blame and not a client: then these are all of them.

    Args:
        replies: By client.
        before: The model that they started from.
        is_usable: Tells whether a model can be used.
    """
    distances = {client: _distance(reply.arrays, before) for client, reply in replies.items()}
    limit = _FAR * statistics.median_low(distances.values())
    found: dict[int, str] = {}
    for client, reply in replies.items():
        if not is_usable(dict(reply.arrays)):
            found[client] = "its model has a loss that is not finite, or beyond 1e+09"
        elif distances[client] > limit:
            found[client] = f"the new model cannot be used with its own, which moved more than {_FAR:g} times as far as others"
    return found


def _distance(arrays: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> float:
    squares = (np.square(arrays[name].astype(np.float64) - start).sum() for name, start in before.items())
    return math.sqrt(sum(squares))
