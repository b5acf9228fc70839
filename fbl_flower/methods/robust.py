"""Robust aggregation: what takes the place of the mean of the clients' models, so that a few hostile clients cannot move it far.

With w the model that the clients received, w_k client k's model, u_k = w_k - w its update, and n the number of clients with images:

- `median` and `trimmed-mean` (Yin et al., arXiv 1803.01498) look at each number of the model by itself;
- `clipped`, `krum` (Blanchard et al., NeurIPS 2017) and `geometric-median` (Pillutla et al., arXiv 1912.13445) look at a whole update,
  and end in a weighted mean whose weights follow from norms and distances.

As with the mean, results have the dtype of the model, and whole-number arrays are rounded. They do not count in norms and distances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fbl_flower.config import AggregationConfig, rounded_up
from fbl_flower.params import Arrays, in_dtype_of, weighted_mean

_SMOOTHING = 1e-6  # nu of Pillutla et al.
_MOST_STEPS, _CLOSE_ENOUGH = 100, 1e-4  # of Weiszfeld's algorithm; close in the clients' shares
Model = Mapping[str, np.ndarray]


def aggregate(received: Model, models: Sequence[Model], weights: Sequence[float], config: AggregationConfig) -> Arrays:
    """Return what `aggregation.rule` makes of the clients' models.

    Args:
        received: w.
        models: w_k, of the same names and shapes, all finite.
        weights: Of FedAvg. `median`, `trimmed-mean` and `krum` only leave out the clients whose weight is 0.
        config: The rule and its settings.

    Raises:
        ValueError: No client has a positive weight.
    """
    if config.rule == "mean":
        return weighted_mean(models, weights)
    counted = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight > 0]
    if not counted:
        raise ValueError(f"weights: got {list(weights)}; expected a positive one")
    models, weights = [model for model, _ in counted], [weight for _, weight in counted]
    match config.rule:
        case "median":
            return coordinate_wise(models, median)
        case "trimmed-mean":
            return coordinate_wise(models, lambda stack: trimmed_mean(stack, config.trim))
        case "clipped":
            shares = clipped_shares(distances(models, received), weights, config.clip_norm)
            return weighted_mean([received, *models], [max(0.0, 1 - sum(shares)), *shares])
        case "krum":
            return weighted_mean(
                models, krum_choice(np.array([distances(models, model) for model in models]), config.attackers)
            )
        case "geometric-median":
            return geometric_median(models, weights)
    raise ValueError(f"aggregation.rule: got {config.rule!r}")


def median(stack: np.ndarray) -> np.ndarray:
    """Return the median over the first axis; of an even number, the mean of the two in the middle."""
    return np.asarray(np.median(stack, axis=0))


def trimmed_mean(stack: np.ndarray, trim: float) -> np.ndarray:
    """Return the mean over the first axis without the b lowest and the b highest values, b = ceil(trim n).

    b is rounded up, so that it covers a share of `trim` hostile clients, and leaves at least one value.
    """
    number = len(stack)
    cut = min(rounded_up(trim, number), (number - 1) // 2)
    return np.asarray(np.sort(stack, axis=0)[cut : number - cut].mean(axis=0))


def coordinate_wise(models: Sequence[Model], rule: Callable[[np.ndarray], np.ndarray]) -> Arrays:
    """Apply a rule from float64 [n, ...] to [...] to each array."""
    return {
        name: in_dtype_of(like, rule(np.stack([model[name].astype(np.float64) for model in models])))
        for name, like in models[0].items()
    }


def clipped_shares(norms: np.ndarray, weights: Sequence[float], clip_norm: float) -> list[float]:
    """Return p_k min(1, C / |u_k|), the weight of each update: p_k is client k's part of the weights, and C = 0 the median norm."""
    limit = clip_norm or float(np.median(norms))
    total = sum(weights)
    return [weight / total * (min(1.0, limit / norm) if norm else 1.0) for norm, weight in zip(norms, weights, strict=True)]


def krum_choice(apart: np.ndarray, attackers: int) -> list[float]:
    """Return 1 for the n - f clients of multi-Krum with the lowest scores, else 0.

    A client's score is the sum of the squared distances to its n - f - 2 nearest neighbours. Of equal scores the first client's is lower.

    Args:
        apart: [n, n], distances between models.
        attackers: f. Where n is too small, one neighbour and one client are still looked at.
    """
    number = len(apart)
    neighbours, chosen = max(1, number - attackers - 2), max(1, number - attackers)
    others = np.where(np.eye(number, dtype=bool), -1.0, apart)  # so that sorting puts the client itself first
    with np.errstate(over="ignore"):
        scores = np.square(np.sort(others, axis=1)[:, 1 : 1 + neighbours]).sum(axis=1)
    choice = np.zeros(number)
    choice[np.argsort(scores, kind="stable")[:chosen]] = 1.0
    return choice.tolist()


def geometric_median(models: Sequence[Model], weights: Sequence[float]) -> Arrays:
    """Return v that minimises sum_k p_k |w_k - v|, by the smoothed Weiszfeld algorithm of RFA (Pillutla et al., Algorithm 2).

    Each step makes v the mean of w_k with weights p_k / max(nu, |w_k - v|). RFA starts from the mean, which takes the longer, the further
    away a hostile client is. Here v starts from the coordinate-wise median. As this may be a client's model, and steps away from one are
    tiny, nu is the median distance in the first step.
    """
    exact = [{name: array.astype(np.float64) for name, array in model.items()} for model in models]
    apart = distances(exact, coordinate_wise(exact, median))
    smoothing, before = max(_SMOOTHING, float(np.median(apart))), np.zeros(len(models))
    for _ in range(_MOST_STEPS):
        shares = np.array(weights) / np.maximum(smoothing, apart)
        shares /= shares.sum()
        if np.abs(shares - before).max() < _CLOSE_ENOUGH:
            break
        smoothing, before = _SMOOTHING, shares
        apart = distances(exact, weighted_mean(exact, shares.tolist()))
    return weighted_mean(models, shares.tolist())


def distances(models: Sequence[Model], other: Model) -> np.ndarray:
    """Return [n], the L2 distance of each model to another, over all arrays of floating-point numbers; beyond float64, infinity."""
    squares = np.zeros(len(models))
    with np.errstate(over="ignore"):
        for name, array in other.items():
            if np.issubdtype(array.dtype, np.floating):
                middle = array.astype(np.float64)
                squares += [np.square(model[name] - middle).sum() for model in models]
        return np.asarray(np.sqrt(squares))
