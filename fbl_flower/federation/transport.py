"""The client's model on its way to the server, in full or as a rounded difference (`transport.precision`).

With fp16 a client sends, for every float32 array of the model, the difference to what it received, rounded to the nearest 16-bit
number: half the bytes. Rounding the difference and not the weights keeps the error small against the step, at most 2^-11 of each
entry's change (and 2^-25 where that is below 2^-14), instead of 2^-11 of the weight. Arrays of other types, which count
something, and everything beside the model (alignment vectors, numbers) go as they are. The way to the client is never rounded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fbl_flower.params import Arrays


def shrink(trained: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray], *, precision: str) -> Arrays:
    """Return what the client sends: the trained arrays, or with fp16 their rounded differences to the received ones."""
    if precision == "fp32":
        return dict(trained)
    with np.errstate(over="ignore"):  # a change beyond fp16 becomes infinite, and the server leaves the client out by name
        return {
            name: (array - received[name]).astype(np.float16) if _is_rounded(array) else array
            for name, array in trained.items()
        }


def restore(sent: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray], *, precision: str) -> Arrays:
    """Return the client's model from what it sent; `received` is what the server had sent to it."""
    if precision == "fp32":
        return dict(sent)
    return {
        name: received[name] + array.astype(np.float32) if _is_rounded(received[name]) else array
        for name, array in sent.items()
    }


def sent_dtype(array: np.ndarray, *, precision: str) -> np.dtype:
    """Return the dtype in which a client sends what it made of an array of the model."""
    return np.dtype(np.float16) if precision == "fp16" and _is_rounded(array) else array.dtype


def _is_rounded(array: np.ndarray) -> bool:
    return array.dtype == np.float32
