"""Variations of a client's own images, for classes of which it has few.

Such an image is derived from a single real one and may show it almost unchanged. It is to be treated as a real image: it stays on
the client, in its cache, and is deleted together with the client's data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from fbl_flower.data.examples import Examples
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.protocol import ImageToImage
from fbl_flower.seeding import derive


class FromOwnImages:
    """An `ImageGenerator` that starts each image from one of the client's own of the same class; the seed chooses which.

    Args:
        generator: Makes the variations.
        own: The client's real images.

    Attributes:
        fingerprint, batch_size: As `ImageGenerator` has them. The fingerprint covers the pixels of all images in `own`: a cached
            variation is found again only by a client that has the image it was made from.
    """

    def __init__(self, generator: ImageToImage, own: Examples) -> None:
        self._generator = generator
        self._own = own
        self._of_class = {label: torch.nonzero(own.labels == label).flatten() for label in set(own.labels.tolist())}
        digest = hashlib.sha256(f"from-own-images/{generator.image_fingerprint}/{tuple(own.images.shape)}".encode())
        digest.update(own.labels.numpy().tobytes())
        digest.update(own.images.contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def batch_size(self) -> int:
        return self._generator.batch_size

    def generate(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """Return uint8 [M, C, H, W]; also raises `GeneratorError` for a class of which there is no own image."""
        chosen = torch.empty(len(labels), dtype=torch.int64)
        for place, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
            candidates = self._of_class.get(label)
            if candidates is None:
                raise GeneratorError(f"generator.image-to-image: the client has no image of the class {label} to start from")
            chosen[place] = candidates[derive(seed, "source") % len(candidates)]
        return self._generator.generate_from(labels, seeds, self._own.images[chosen])
