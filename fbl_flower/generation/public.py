"""Real public images in a generator's place: the upper bound of filling, and a stand-in where none is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from fbl_flower.data.datasets import DataParts
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.protocol import check_request
from fbl_flower.seeding import derive


class PublicImages:
    """Hands out the public training images of a class, chosen by the seed, with repetition.

    Args:
        parts: Its public part is what there is to choose from; validation stays unseen.
        batch_size: As `ImageGenerator` has it; without effect on the images.
    """

    def __init__(self, parts: DataParts, *, batch_size: int = 32) -> None:
        self.batch_size = batch_size
        self.fingerprint = hashlib.sha256(f"public-images/{parts.public_sha256}".encode()).hexdigest()
        self._images = parts.public.images
        self._names = parts.info.class_names
        self._of_class = [torch.nonzero(parts.public.labels == label).flatten() for label in range(parts.info.num_classes)]

    def generate(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """Return uint8 [M, C, H, W]; also raises `GeneratorError` for a class that has no public image."""
        check_request(labels, seeds, num_classes=len(self._of_class))
        chosen = torch.empty(len(labels), dtype=torch.int64)
        for place, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
            candidates = self._of_class[label]
            if not len(candidates):
                raise GeneratorError(
                    f"public-images: no public image of the class {self._names[label]!r}; "
                    "use more public images (data.num-public), or another generator (generator.name)"
                )
            chosen[place] = candidates[derive(seed, "public-image") % len(candidates)]
        return self._images[chosen]
