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
    return np.array([pixel_key(image) for image in images.numpy()], dtype=np.uint64)


def pixel_key(image: np.ndarray) -> int:
    """Return the key of one image, uint8 [C, H, W]: 64 bits."""
    digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8, key=repr(tuple(image.shape)).encode())
    return int.from_bytes(digest.digest(), "big")


def examples_sha256(examples: Examples) -> str:
    """Return a digest of the pixels and labels of `examples`, in their order."""
    digest = hashlib.sha256()
    for tensor in (examples.images, examples.labels):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
