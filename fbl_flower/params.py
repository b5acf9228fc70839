"""A model's parameters as named arrays, and their weighted mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

Arrays = dict[str, np.ndarray]


def to_arrays(state: Mapping[str, torch.Tensor]) -> Arrays:
    """Copy a state dict to numpy arrays, by name, each in its own dtype."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}


def to_state(arrays: Mapping[str, np.ndarray], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Copy named arrays to a state dict on `device`."""
    return {name: torch.tensor(array, device=device) for name, array in arrays.items()}


def all_finite(arrays: Mapping[str, np.ndarray]) -> bool:
    """Tell whether no array holds a NaN or an infinity."""
    return all(np.isfinite(array).all() for array in arrays.values())


def weighted_mean(parts: Sequence[Mapping[str, np.ndarray]], weights: Sequence[float]) -> Arrays:
    """Average named arrays: sum_k (w_k / sum w) a_k, for every name, summed in the order given (FedAvg).

    Sums run in float64; a result has the dtype of its inputs. Whole-number arrays (BatchNorm's count of batches) are rounded.

    Raises:
        ValueError: No parts, weights that do not sum to a positive number, or parts whose names or shapes differ.
    """
    total = float(sum(weights))
    if not parts or total <= 0 or min(weights) < 0:
        raise ValueError(f"weights: got {list(weights)}; wanted one >= 0 for each part and a positive sum")
    first = parts[0]
    mean: Arrays = {}
    for name, like in first.items():
        accumulated = np.zeros(like.shape, dtype=np.float64)
        for part, weight in zip(parts, weights, strict=True):
            if part.keys() != first.keys() or part[name].shape != like.shape:
                raise ValueError(f"parameters differ between clients at {name!r}")
            accumulated += part[name].astype(np.float64) * (weight / total)
        mean[name] = in_dtype_of(like, accumulated)
    return mean


def capped(weights: Sequence[float], *, largest_share: float) -> list[float]:
    """Return weights of which none is more than `largest_share` of their sum: larger ones are cut to one common height.

    Where the share is too small for so few weights, those that are not zero become equal. With 1 nothing changes.
    """
    if largest_share >= 1.0:
        return list(weights)
    above = sorted((weight for weight in weights if weight > 0), reverse=True)
    if largest_share * len(above) <= 1.0:
        return [float(weight > 0) for weight in weights]
    number, height = 0, largest_share * sum(above)  # how many are cut, and to what
    while number < len(above) - 1 and above[number] > height:
        number += 1
        height = largest_share * sum(above[number:]) / (1 - number * largest_share)
    return [min(weight, height) for weight in weights]


def in_dtype_of(like: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return float64 values in the dtype of another array, rounded if that is of whole numbers."""
    whole = np.issubdtype(like.dtype, np.integer)
    return np.asarray(np.rint(values) if whole else values, dtype=like.dtype)  # of one number NumPy makes a scalar
