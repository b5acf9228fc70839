"""What a source of synthetic images is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from fbl_flower.errors import GeneratorError


class ImageGenerator(Protocol):
    """Makes images of given classes.

    The pixels follow from the label, the seed and the `fingerprint`, on one machine with one number of threads;
    never from what else is asked for in the same call.

    Attributes:
        fingerprint: Hex digest of everything else that decides the pixels: weights, steps, guidance, batch size ...
        batch_size: Images that are made together, as memory allows now; asking for multiples of it wastes nothing. Where it depends on
            memory, asking for it may load the network.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def batch_size(self) -> int: ...

    def generate(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """Return uint8 [M, C, H, W], an image for each pair of a label and a seed (0 .. 2**63 - 1).

        Raises:
            GeneratorError: A label is outside the classes, a seed outside its range, or the lengths differ.
        """
        ...


class ImageToImage(ImageGenerator, Protocol):
    """A generator that can also start from images instead of noise.

    Attributes:
        image_fingerprint: As `fingerprint`, of everything but the starting image that decides the pixels of `generate_from`.
    """

    @property
    def image_fingerprint(self) -> str: ...

    def generate_from(self, labels: Sequence[int], seeds: Sequence[int], images: torch.Tensor) -> torch.Tensor:
        """Return uint8 [M, C, H, W], a variation of each of `images` (uint8, the same shape) as its label and seed have it.

        Raises:
            GeneratorError: As `generate`.
        """
        ...


def check_request(labels: Sequence[int], seeds: Sequence[int], *, num_classes: int) -> None:
    """Refuse what no generator can make; raises as `ImageGenerator.generate` does."""
    if len(labels) != len(seeds):
        raise GeneratorError(f"generator: got {len(labels)} labels and {len(seeds)} seeds; wanted a seed for each label")
    if wrong := [label for label in labels if not 0 <= label < num_classes]:
        raise GeneratorError(f"generator: got the label {wrong[0]}; wanted 0 to {num_classes - 1}")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**63]:
        raise GeneratorError(f"generator: got the seed {wrong[0]}; wanted 0 to 2**63 - 1")
