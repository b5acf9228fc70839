"""Named random streams from one seed: "client 3, round 7". Nothing here touches a global generator."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *name: str | int) -> int:
    """Return the seed, in 0 .. 2**63 - 1, of the stream `name` under the run's `seed`.

    The same arguments give the same number on every machine; any change gives an unrelated one.
    """
    if any("/" in part for part in name if isinstance(part, str)):
        raise ValueError(f"stream name: got {name!r}; a part may not contain '/', which separates them")
    parts = [f"str:{part}" if isinstance(part, str) else f"int:{int(part)}" for part in name]
    text = "/".join([str(int(seed)), *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_stream(seed: int, *name: str | int) -> np.random.Generator:
    """Return numpy's generator for the stream `name`."""
    return np.random.default_rng(derive(seed, *name))


def torch_stream(seed: int, *name: str | int) -> torch.Generator:
    """Return torch's CPU generator for the stream `name`."""
    return torch.Generator().manual_seed(derive(seed, *name))
