"""What tells images apart, wherever they were read from: a key of their pixels, and digests of whole parts."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from fbl_flower.data.examples import Examples


def pixel_keys(images: torch.Tensor) -> np.ndarray:
    """Return uint64 [N], a key of each image's pixels: equal for equal images, unrelated for others.

    Args:
        images: uint8 [N, C, H, W].
    """
    shape = repr(tuple(images.shape[1:])).encode()
    rows = images.flatten(1).contiguous().numpy()
    keys = b"".join(hashlib.blake2b(row.data, digest_size=8, key=shape).digest() for row in rows)
    return np.frombuffer(keys, dtype=">u8").astype(np.uint64)


def examples_sha256(examples: Examples) -> str:
    """Return a digest of the pixels and labels of `examples`, in their order."""
    digest = hashlib.sha256()
    for tensor in (examples.images, examples.labels):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
