"""Real public images in a generator's place: the upper bound of filling, and, degraded, a stand-in where none is trained."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from fbl_flower.data.datasets import DataParts
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.protocol import check_request
from fbl_flower.seeding import derive, torch_stream


class PublicImages:
    """Hands out the public training images of a class, chosen by the seed, with repetition.

    Args:
        parts: Its public part is what there is to choose from; validation stays unseen.
        batch_size: As `ImageGenerator` has it; without effect on the images.
        blur: Standard deviation in pixels of a Gaussian blur; 0: none.
        noise: Standard deviation of Gaussian noise after the blur, in units of the whole range of a pixel; 0: none.
    """

    def __init__(self, parts: DataParts, *, batch_size: int = 32, blur: float = 0.0, noise: float = 0.0) -> None:
        self.batch_size = batch_size
        degraded = f"/blur {blur!r}/noise {noise!r}" if blur or noise else ""
        self.fingerprint = hashlib.sha256(f"public-images/{parts.public_sha256}{degraded}".encode()).hexdigest()
        self._blur, self._noise = blur, noise
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
        images = self._images[chosen]
        if not (self._blur or self._noise):
            return images
        pixels = images.float() / 255
        if self._blur:
            pixels = blurred(pixels, self._blur)
        if self._noise:
            noise = [torch.randn(pixels.shape[1:], generator=torch_stream(seed, "public-noise")) for seed in seeds]
            pixels = pixels + self._noise * torch.stack(noise) if noise else pixels
        return (255 * pixels).round_().clamp_(0, 255).to(torch.uint8)


def blurred(images: torch.Tensor, deviation: float) -> torch.Tensor:
    """Blur float [N, C, H, W] with a Gaussian of `deviation` pixels, cut off at three deviations; the border's pixels go on outside.

    A sum of shifted images and no convolution, so that an image's pixels do not depend on what is blurred with it.
    """
    radius = math.ceil(3 * deviation)
    weights = [math.exp(-0.5 * (step / deviation) ** 2) for step in range(-radius, radius + 1)]
    for dim in (-1, -2):
        size = images.shape[dim]
        shifted = torch.zeros_like(images)
        for step, weight in zip(range(-radius, radius + 1), weights, strict=True):
            shifted += weight / sum(weights) * images.index_select(dim, (torch.arange(size) + step).clamp_(0, size - 1))
        images = shifted
    return images
