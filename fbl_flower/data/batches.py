"""From uint8 images in memory to augmented float batches, all tensor operations, no per-image Python."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Scale uint8 0 .. 255 to float -1 .. 1."""
    return images.float().div_(127.5).sub_(1.0)


def batch_indices(num_images: int, batch_size: int, rng: torch.Generator) -> Iterator[torch.Tensor]:
    """Shuffle 0 .. num_images - 1 and cut it into batches; every image is in exactly one."""
    yield from torch.randperm(num_images, generator=rng).split(batch_size)


def augment(images: torch.Tensor, *, shift: int, flip: bool, rng: torch.Generator) -> torch.Tensor:
    """Shift every image by its own random offset and, for photographs, mirror half of them.

    Args:
        images: uint8 [N, C, H, W].
        shift: Largest offset in pixels, up, down, left and right; what comes into view repeats the border.
        flip: Whether to mirror.
        rng: The offsets' generator, on the CPU.

    Returns:
        uint8 [N, C, H, W].
    """
    n, _, height, width = images.shape
    rows = torch.arange(height).expand(n, height)
    columns = torch.arange(width).expand(n, width)
    if shift:
        offset = torch.randint(-shift, shift + 1, (2, n, 1), generator=rng)
        rows = (rows + offset[0]).clamp_(0, height - 1)
        columns = (columns + offset[1]).clamp_(0, width - 1)
    if flip:
        mirrored = torch.rand(n, 1, generator=rng) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).to(images.device)
    return images.flatten(2).gather(2, index.expand(-1, images.shape[1], -1)).view_as(images)


def antialiased(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize uint8 images [N, C, H, W] to `size` pixels, without aliasing."""
    if images.shape[-1] == size:
        return images
    floats = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return floats.round().clamp(0, 255).to(torch.uint8)
