"""Synthetic images on disk: made once, found again by every later round and run.

A generator's image follows from its fingerprint, label and seed, so those three are the key and nothing ever goes
stale. Each image is a file of its own: several processes can write at once, and a kill loses one batch at most.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.protocol import ImageGenerator
from fbl_flower.whole_file import replacing

_HEADER = struct.Struct("<4s3H32s")  # magic, C, H, W, SHA-256 of key, shape and pixels
_MAGIC = b"FBL1"


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What `generate_cached` returns.

    Attributes:
        images: uint8 [M, C, H, W], in the order in which they were asked for.
        present: bool, for each that was asked for: whether it is among them. All are, unless time ran out.
        num_generated: How many of them were not on disk.
    """

    images: torch.Tensor
    present: torch.Tensor
    num_generated: int


class ImageCache:
    """A folder of images, safe with several threads and processes at once.

    Args:
        folder: Is made when the first image is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, fingerprint: str, label: int, seed: int) -> Path:
        """Return where the image with this key is, or would be; the name tells neither label nor seed."""
        return self.folder / fingerprint[:16] / hashlib.sha256(_key(fingerprint, label, seed)).hexdigest()

    def get(self, fingerprint: str, label: int, seed: int) -> torch.Tensor | None:
        """Return uint8 [C, H, W], or None where the image is absent or its file is damaged."""
        try:
            blob = self.path(fingerprint, label, seed).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(self.folder, error) from error
        if len(blob) < _HEADER.size:
            return None
        magic, channels, height, width, digest = _HEADER.unpack_from(blob)
        shape, pixels = (channels, height, width), blob[_HEADER.size :]
        if magic != _MAGIC or digest != _digest(_key(fingerprint, label, seed), shape, pixels):
            return None
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape)

    def put(self, fingerprint: str, label: int, seed: int, image: torch.Tensor) -> None:
        """Store uint8 [C, H, W]. The file appears whole; of several writers the last wins, with the same bytes.

        Raises:
            GeneratorError: The folder cannot be written.
        """
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise TypeError(f"image: got {image.dtype} {tuple(image.shape)}; wanted uint8 [C, H, W]")
        path, shape = self.path(fingerprint, label, seed), (image.shape[0], image.shape[1], image.shape[2])
        pixels = image.contiguous().numpy().tobytes()
        header = _HEADER.pack(_MAGIC, *shape, _digest(_key(fingerprint, label, seed), shape, pixels))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
            # not synced: a file torn by a power cut fails its sum
            with replacing(path, part=Path(name)), os.fdopen(handle, "wb") as stream:
                stream.write(header + pixels)
        except OSError as error:
            raise _unusable(self.folder, error) from error


def generate_cached(
    generator: ImageGenerator,
    cache: ImageCache,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    progress: Callable[[int, int], None] | None = None,
    deadline: float = math.inf,
) -> Generated:
    """Return an image for each pair of a label and a seed, from disk where it is there.

    Args:
        generator: Makes what is not on disk, in batches; each batch is stored before the next begins.
        cache: Where to look, and to store.
        labels, seeds: Of the same length; a pair that comes twice is made once.
        progress: Is called after each batch with the images made and those to make in this call.
        deadline: Reading of `time.monotonic()` that no batch should pass: one is begun only if as long as the last one took is left. The
            first is begun if any time is left before the generator is loaded. What is missing then is left out.

    Raises:
        GeneratorError: As `generator.generate`, or the cache's folder cannot be used.
    """
    if len(labels) != len(seeds):
        raise GeneratorError(f"generator: got {len(labels)} labels and {len(seeds)} seeds; wanted a seed for each label")
    if len(labels) == 0:
        return Generated(images=generator.generate([], []), present=torch.ones(0, dtype=torch.bool), num_generated=0)
    pairs = list(zip(labels, seeds, strict=True))
    found: dict[tuple[int, int], torch.Tensor] = {}
    missing: list[tuple[int, int]] = []
    for pair in dict.fromkeys(pairs):
        image = cache.get(generator.fingerprint, *pair)
        if image is None:
            missing.append(pair)
        else:
            found[pair] = image
    num_generated = 0
    begins = bool(missing) and time.monotonic() < deadline
    # This loads the model, where that was put off. If that alone takes as long, the first batch is still made: else there never would be one.
    size, now = generator.batch_size if begins else 0, time.monotonic()
    while num_generated < len(missing) and begins:
        batch = missing[num_generated : num_generated + size]
        images = generator.generate([label for label, _ in batch], [seed for _, seed in batch])
        for pair, image in zip(batch, images, strict=True):
            cache.put(generator.fingerprint, *pair, image)
            found[pair] = image
        num_generated += len(batch)
        if progress:
            progress(num_generated, len(missing))
        size = generator.batch_size  # memory may have become short
        before, now = now, time.monotonic()
        begins = now + (now - before) <= deadline
    present = [pair in found for pair in pairs]
    there = [found[pair] for pair in pairs if pair in found]
    return Generated(
        images=torch.stack(there) if there else generator.generate([], []),
        present=torch.tensor(present),
        num_generated=num_generated,
    )


def _key(fingerprint: str, label: int, seed: int) -> bytes:
    return f"{fingerprint}/{int(label)}/{int(seed)}".encode()


def _digest(key: bytes, shape: tuple[int, int, int], pixels: bytes) -> bytes:
    return hashlib.sha256(b"%s/%d/%d/%d/" % (key, *shape) + pixels).digest()


def _unusable(folder: Path, error: OSError) -> GeneratorError:
    return GeneratorError(
        f"image cache: {folder} cannot be used ({error}); free space, mend its permissions, or choose another folder (state-dir)",
        public=f"its image cache cannot be used: {error.strerror or type(error).__name__}",
    )
