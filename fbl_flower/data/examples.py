"""The one container of images that everything else passes around."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled images in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], in 0 .. number of classes - 1.
        synthetic: bool [N]; True where knowledge filling put the image in a real one's place.
    """

    images: torch.Tensor
    labels: torch.Tensor
    synthetic: torch.Tensor

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise TypeError(f"images: got {self.images.dtype} {tuple(self.images.shape)}; wanted uint8 [N, C, H, W]")
        if self.labels.dtype != torch.int64 or self.labels.shape != (n,):
            raise TypeError(f"labels: got {self.labels.dtype} {tuple(self.labels.shape)}; wanted int64 [{n}]")
        if self.synthetic.dtype != torch.bool or self.synthetic.shape != (n,):
            raise TypeError(f"synthetic: got {self.synthetic.dtype} {tuple(self.synthetic.shape)}; wanted bool [{n}]")

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def real(cls, images: torch.Tensor, labels: torch.Tensor) -> Examples:
        """Wrap real images (uint8 [N, C, H, W]) and their labels (int64 [N])."""
        return cls(images=images, labels=labels, synthetic=torch.zeros(len(labels), dtype=torch.bool))

    def take(self, index: torch.Tensor) -> Examples:
        """Return the examples at `index` (int64 [M]), in that order."""
        return Examples(images=self.images[index], labels=self.labels[index], synthetic=self.synthetic[index])

    def to(self, device: torch.device) -> Examples:
        """Return the examples on `device`."""
        return Examples(images=self.images.to(device), labels=self.labels.to(device), synthetic=self.synthetic.to(device))

    @functools.cached_property
    def digest(self) -> str:
        """Tell these images and labels from others; a hash of both."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        digest.update(self.images.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def counts(self, num_classes: int) -> torch.Tensor:
        """Return int64 [num_classes], the number of images of each class (n^c in the paper)."""
        return torch.bincount(self.labels, minlength=num_classes)


def concatenate(*parts: Examples) -> Examples:
    """Join examples, in order."""
    return Examples(
        images=torch.cat([p.images for p in parts]),
        labels=torch.cat([p.labels for p in parts]),
        synthetic=torch.cat([p.synthetic for p in parts]),
    )
